// The app of an IPA that was made without Xcode: it shows what the bundle is, checks every file against
// manifest.json, and loads a Core ML model where there is one. No SDK headers are at hand, so what is used of
// Foundation, UIKit and Core ML is declared here.

typedef unsigned long NSUInteger;
typedef long NSInteger;
typedef signed char BOOL_;
typedef double CGFloat;
typedef struct { CGFloat x, y, width, height; } CGRect;
typedef struct { unsigned int count[2]; unsigned int hash[8]; unsigned int buffer[16]; } CC_SHA256_CTX;

@class NSString, NSDictionary, NSData, NSBundle, NSURL, NSError, NSMutableString, UIScreen, UIColor, UIViewController;

__attribute__((objc_root_class)) @interface NSObject
+ (instancetype)alloc;
- (instancetype)init;
- (NSString *)description;
@end
@interface NSString : NSObject
+ (NSString *)stringWithFormat:(NSString *)format, ...;
- (NSString *)stringByAppendingPathComponent:(NSString *)part;
- (NSString *)stringByDeletingLastPathComponent;
- (const char *)UTF8String;
- (signed char)isEqualToString:(NSString *)other;
- (signed char)containsString:(NSString *)other;
@end
@interface NSMutableString : NSString
+ (NSMutableString *)string;
- (void)appendFormat:(NSString *)format, ...;
@end
@interface NSArray : NSObject
@property(readonly) NSUInteger count;
- (id)objectAtIndex:(NSUInteger)index;
- (NSArray *)sortedArrayUsingSelector:(SEL)order;
@end
@interface NSDictionary : NSObject
- (id)objectForKey:(id)key;
- (NSArray *)allKeys;
@end
@interface NSData : NSObject
+ (NSData *)dataWithContentsOfFile:(NSString *)path options:(NSUInteger)options error:(NSError **)error;
@property(readonly) const void *bytes;
@property(readonly) NSUInteger length;
@end
@interface NSBundle : NSObject
+ (NSBundle *)mainBundle;
- (NSString *)resourcePath;
@end
@interface NSURL : NSObject
+ (NSURL *)fileURLWithPath:(NSString *)path;
@end
@interface NSJSONSerialization : NSObject
+ (id)JSONObjectWithData:(NSData *)data options:(NSUInteger)options error:(NSError **)error;
@end
@interface UIScreen : NSObject
+ (UIScreen *)mainScreen;
- (CGRect)bounds;
@end
@interface UIColor : NSObject
+ (UIColor *)whiteColor;
@end
@interface UIView : NSObject
- (instancetype)initWithFrame:(CGRect)frame;
- (void)setBackgroundColor:(UIColor *)color;
@end
@interface UITextView : UIView
- (void)setText:(NSString *)text;
- (void)setEditable:(signed char)editable;
@end
@interface UIViewController : NSObject
- (void)setView:(UIView *)view;
@end
@interface UIWindow : UIView
- (void)setRootViewController:(UIViewController *)controller;
- (void)makeKeyAndVisible;
@end
@interface UIResponder : NSObject
@end
@interface MLModel : NSObject
+ (NSURL *)compileModelAtURL:(NSURL *)url error:(NSError **)error;
+ (MLModel *)modelWithContentsOfURL:(NSURL *)url error:(NSError **)error;
@end

int UIApplicationMain(int count, char **arguments, NSString *application, NSString *delegate);
int CC_SHA256_Init(CC_SHA256_CTX *context);
int CC_SHA256_Update(CC_SHA256_CTX *context, const void *data, unsigned int length);
int CC_SHA256_Final(unsigned char *digest, CC_SHA256_CTX *context);
void *objc_autoreleasePoolPush(void);
void objc_autoreleasePoolPop(void *pool);

static NSString *digestOf(NSString *path) {
  NSData *data = [NSData dataWithContentsOfFile:path options:1 /* mapped if safe */ error:0];
  if (!data) return @"unreadable";
  CC_SHA256_CTX context;
  unsigned char digest[32];
  CC_SHA256_Init(&context);
  NSUInteger position = 0, length = data.length;
  while (position < length) {
    NSUInteger take = length - position < (1u << 24) ? length - position : (1u << 24);
    CC_SHA256_Update(&context, (const char *)data.bytes + position, (unsigned int)take);
    position += take;
  }
  CC_SHA256_Final(digest, &context);
  NSMutableString *text = [NSMutableString string];
  for (int i = 0; i < 32; i++) [text appendFormat:@"%02x", digest[i]];
  return text;
}

static void checkFiles(NSDictionary *manifest, NSString *home, NSMutableString *text) {
  NSDictionary *files = [manifest objectForKey:@"files"];
  NSArray *names = [[files allKeys] sortedArrayUsingSelector:@selector(compare:)];
  NSUInteger wrong = 0;
  for (NSUInteger i = 0; i < names.count; i++) {
    void *pool = objc_autoreleasePoolPush();
    NSString *name = [names objectAtIndex:i];
    NSString *expected = [[files objectForKey:name] objectForKey:@"sha256"];
    if (![digestOf([home stringByAppendingPathComponent:name]) isEqualToString:expected]) {
      wrong++;
      [text appendFormat:@"changed: %@\n", name];
    }
    objc_autoreleasePoolPop(pool);
  }
  [text appendFormat:@"%lu files, %lu not as manifest.json says\n", names.count, wrong];
}

static void loadCoreML(NSDictionary *manifest, NSString *home, NSMutableString *text) {
  NSArray *names = [[manifest objectForKey:@"files"] allKeys];
  for (NSUInteger i = 0; i < names.count; i++) {
    NSString *name = [names objectAtIndex:i];
    if (![name containsString:@".mlpackage/Manifest.json"]) continue;
    NSString *package = [[home stringByAppendingPathComponent:name] stringByDeletingLastPathComponent];
    NSError *error = 0;
    NSURL *compiled = [MLModel compileModelAtURL:[NSURL fileURLWithPath:package] error:&error];
    MLModel *model = compiled ? [MLModel modelWithContentsOfURL:compiled error:&error] : 0;
    [text appendFormat:@"%@: %@\n", package, model ? @"loads" : [(NSObject *)error description]];
  }
}

@interface BundleRunner : UIResponder
@property(strong) UIWindow *window;
@end

@implementation BundleRunner
- (signed char)application:(id)application didFinishLaunchingWithOptions:(NSDictionary *)options {
  NSString *home = [[[NSBundle mainBundle] resourcePath] stringByAppendingPathComponent:@"Model"];
  NSMutableString *text = [NSMutableString string];
  NSData *raw = [NSData dataWithContentsOfFile:[home stringByAppendingPathComponent:@"manifest.json"] options:0 error:0];
  NSDictionary *manifest = raw ? [NSJSONSerialization JSONObjectWithData:raw options:0 error:0] : 0;
  if (manifest) {
    [text appendFormat:@"%@\ntarget %@, context %@ tokens\n\n", [manifest objectForKey:@"name"],
                       [manifest objectForKey:@"target"], [manifest objectForKey:@"context"]];
    checkFiles(manifest, home, text);
    loadCoreML(manifest, home, text);
  } else {
    [text appendFormat:@"manifest.json cannot be read\n"];
  }
  CGRect bounds = [[UIScreen mainScreen] bounds];
  self.window = [[UIWindow alloc] initWithFrame:bounds];
  UITextView *view = [[UITextView alloc] initWithFrame:bounds];
  [view setEditable:0];
  [view setText:text];
  [view setBackgroundColor:[UIColor whiteColor]];
  UIViewController *controller = [[UIViewController alloc] init];
  [controller setView:view];
  [self.window setRootViewController:controller];
  [self.window makeKeyAndVisible];
  return 1;
}
@end

int main(int count, char **arguments) {
  void *pool = objc_autoreleasePoolPush();
  int status = UIApplicationMain(count, arguments, 0, @"BundleRunner");
  objc_autoreleasePoolPop(pool);
  return status;
}
