import Foundation

/// The model's special tokens, which are data in what a user types.
struct Marks {
    private let marks: [String]

    init(_ manifest: ModelBundle.Manifest) { marks = (manifest.tokenizer.marks ?? []).filter { $0.count > 1 } }

    /// A space without width makes plain text of each.
    func plain(_ text: String) -> String {
        marks.reduce(text.trimmingCharacters(in: .whitespacesAndNewlines)) { said, mark in
            said.replacingOccurrences(of: mark, with: mark.prefix(1) + "\u{200B}" + mark.dropFirst())
        }
    }
}
