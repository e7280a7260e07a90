/* Faults of files and of the clock, by LD_PRELOAD: `tests/support/faults/faulty.py` says which and when.

   Every operation on a file below `under` is counted, over all processes; at the n-th one a signal is sent or the
   operation fails. What the C library does inside (stdio's own reads and writes) and pages of a mapping that are
   read or written later pass by: of a file that is mapped, opening and mapping are seen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { READ = 1, WRITE = 2 };
enum { COUNT = 0, KILL_GROUP = 1, SIGNAL = 2, FAIL = 3 };

/* The same fields, in this order, as `Control` in faulty.py. */
struct control {
    int32_t owner;  /* a process that is left alone */
    int32_t kinds;  /* READ | WRITE */
    int32_t action;
    int32_t number; /* the signal, or errno */
    int64_t at;     /* the first operation that it happens to, from 1 */
    int64_t until;  /* the last one that fails */
    int64_t seen;   /* operations so far */
    int64_t fired;  /* how often something happened */
    int32_t victim; /* the process that it happened to last */
    int32_t pad;
    int64_t clock_at;   /* the reading of the wall clock from which on it is `clock_back` seconds earlier */
    int64_t clock_back;
    int64_t clock_seen;
    char under[4096];
    char what[256]; /* what it happened to */
};

static struct control *control;

static void attach(void) {
    static int tried;
    const char *name;
    if (tried) return;
    tried = 1;
    name = getenv("FAULT_CONTROL");
    if (!name) return;
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    int fd = real(name, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *(*map)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap");
    void *at = map(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED) control = at;
    close(fd);
}

static int armed(int kind) {
    attach();
    return control && (control->kinds & kind) && control->owner != getpid();
}

/* 0, or the errno that the operation fails with. */
static int strike(const char *operation, const char *path) {
    int64_t now;
    if (!control->under[0] || strncmp(path, control->under, strlen(control->under)) != 0) return 0;
    now = __sync_add_and_fetch(&control->seen, 1);
    if (control->action == COUNT || now < control->at || now > control->until) return 0;
    __sync_add_and_fetch(&control->fired, 1);
    control->victim = getpid();
    snprintf(control->what, sizeof control->what, "%s %s", operation, path + strlen(control->under));
    if (control->action == KILL_GROUP) kill(0, SIGKILL);
    if (control->action == SIGNAL) kill(getpid(), control->number);
    return control->action == FAIL ? control->number : 0;
}

static int by_name(int kind, const char *operation, int folder, const char *path) {
    char whole[8192], link[64];
    ssize_t size;
    if (!path || !armed(kind)) return 0;
    if (path[0] == '/') return strike(operation, path);
    if (folder == AT_FDCWD) {
        if (!getcwd(whole, 4096)) return 0;
        size = strlen(whole);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        size = readlink(link, whole, 4096);
        if (size < 0) return 0;
    }
    snprintf(whole + size, sizeof whole - size, "/%s", path);
    return strike(operation, whole);
}

static int by_number(int kind, const char *operation, int fd) {
    char path[4097], link[64];
    ssize_t size;
    if (!armed(kind)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    size = readlink(link, path, 4096);
    if (size < 0) return 0;
    path[size] = 0;
    return strike(operation, path);
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define GUARD(check, failed) do { int error_ = (check); if (error_) { errno = error_; return failed; } } while (0)
#define KIND(flags) (((flags) & (O_WRONLY | O_RDWR | O_CREAT)) ? WRITE : READ)
#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int flags, ...) { REAL(open); MODE(flags) GUARD(by_name(KIND(flags), "open", AT_FDCWD, path), -1); return real(path, flags, mode); }
int open64(const char *path, int flags, ...) { REAL(open64); MODE(flags) GUARD(by_name(KIND(flags), "open", AT_FDCWD, path), -1); return real(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { REAL(openat); MODE(flags) GUARD(by_name(KIND(flags), "open", at, path), -1); return real(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { REAL(openat64); MODE(flags) GUARD(by_name(KIND(flags), "open", at, path), -1); return real(at, path, flags, mode); }
int creat(const char *path, mode_t mode) { REAL(creat); GUARD(by_name(WRITE, "create", AT_FDCWD, path), -1); return real(path, mode); }
FILE *fopen(const char *path, const char *how) { REAL(fopen); GUARD(by_name(how[0] == 'r' ? READ : WRITE, "open", AT_FDCWD, path), NULL); return real(path, how); }
FILE *fopen64(const char *path, const char *how) { REAL(fopen64); GUARD(by_name(how[0] == 'r' ? READ : WRITE, "open", AT_FDCWD, path), NULL); return real(path, how); }

ssize_t read(int fd, void *to, size_t size) { REAL(read); GUARD(by_number(READ, "read", fd), -1); return real(fd, to, size); }
ssize_t pread(int fd, void *to, size_t size, off_t at) { REAL(pread); GUARD(by_number(READ, "read", fd), -1); return real(fd, to, size, at); }
ssize_t pread64(int fd, void *to, size_t size, off64_t at) { REAL(pread64); GUARD(by_number(READ, "read", fd), -1); return real(fd, to, size, at); }
ssize_t readv(int fd, const struct iovec *to, int count) { REAL(readv); GUARD(by_number(READ, "read", fd), -1); return real(fd, to, count); }
void *mmap(void *at, size_t size, int rights, int flags, int fd, off_t from) { REAL(mmap); if (fd >= 0) GUARD(by_number(READ, "map", fd), MAP_FAILED); return real(at, size, rights, flags, fd, from); }
void *mmap64(void *at, size_t size, int rights, int flags, int fd, off64_t from) { REAL(mmap64); if (fd >= 0) GUARD(by_number(READ, "map", fd), MAP_FAILED); return real(at, size, rights, flags, fd, from); }

ssize_t write(int fd, const void *from, size_t size) { REAL(write); GUARD(by_number(WRITE, "write", fd), -1); return real(fd, from, size); }
ssize_t pwrite(int fd, const void *from, size_t size, off_t at) { REAL(pwrite); GUARD(by_number(WRITE, "write", fd), -1); return real(fd, from, size, at); }
ssize_t pwrite64(int fd, const void *from, size_t size, off64_t at) { REAL(pwrite64); GUARD(by_number(WRITE, "write", fd), -1); return real(fd, from, size, at); }
ssize_t writev(int fd, const struct iovec *from, int count) { REAL(writev); GUARD(by_number(WRITE, "write", fd), -1); return real(fd, from, count); }
ssize_t sendfile(int to, int from, off_t *at, size_t size) { REAL(sendfile); GUARD(by_number(WRITE, "copy to", to), -1); return real(to, from, at, size); }
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) { REAL(sendfile64); GUARD(by_number(WRITE, "copy to", to), -1); return real(to, from, at, size); }
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags) { REAL(copy_file_range); GUARD(by_number(WRITE, "copy to", to), -1); return real(from, a, to, b, size, flags); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); GUARD(by_number(WRITE, "truncate", fd), -1); return real(fd, size); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); GUARD(by_number(WRITE, "truncate", fd), -1); return real(fd, size); }
int fsync(int fd) { REAL(fsync); GUARD(by_number(WRITE, "sync", fd), -1); return real(fd); }

int rename(const char *from, const char *to) { REAL(rename); GUARD(by_name(WRITE, "rename to", AT_FDCWD, to), -1); return real(from, to); }
int renameat(int a, const char *from, int b, const char *to) { REAL(renameat); GUARD(by_name(WRITE, "rename to", b, to), -1); return real(a, from, b, to); }
int unlink(const char *path) { REAL(unlink); GUARD(by_name(WRITE, "remove", AT_FDCWD, path), -1); return real(path); }
int unlinkat(int at, const char *path, int flags) { REAL(unlinkat); GUARD(by_name(WRITE, "remove", at, path), -1); return real(at, path, flags); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); GUARD(by_name(WRITE, "make folder", AT_FDCWD, path), -1); return real(path, mode); }
int mkdirat(int at, const char *path, mode_t mode) { REAL(mkdirat); GUARD(by_name(WRITE, "make folder", at, path), -1); return real(at, path, mode); }
int rmdir(const char *path) { REAL(rmdir); GUARD(by_name(WRITE, "remove folder", AT_FDCWD, path), -1); return real(path); }

static int64_t back(void) {
    attach();
    if (!control || !control->clock_at || control->owner == getpid()) return 0;
    return __sync_add_and_fetch(&control->clock_seen, 1) >= control->clock_at ? control->clock_back : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    if (code == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec -= back();
    return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    REAL(gettimeofday);
    int code = real(now, zone);
    if (code == 0) now->tv_sec -= back();
    return code;
}

time_t time(time_t *to) {
    REAL(time);
    time_t now = real(NULL) - back();
    if (to) *to = now;
    return now;
}
