import Foundation

/// Chats as the model's template writes them: texts in manifest.json, held against the template when it was made.
struct Turns {
    private let about: ModelBundle.Manifest.Chat

    init(_ manifest: ModelBundle.Manifest) throws {
        guard let chat = manifest.tokenizer.chat else {
            throw Problem(manifest.tokenizer.chat_note ?? "the manifest tells no chat")
        }
        about = chat
    }

    /// Texts of the tokens that end an answer.
    var ends: [String] { about.ends }

    /// What stands in front of the model's answer: of a chat that begins, or of one that goes on behind an answer.
    func prompt(_ question: String, begins: Bool) -> String {
        (begins ? about.first : about.next) + plain(question) + about.answer
    }

    /// What a user types is data: a space without width makes plain text of the model's special tokens in it.
    func plain(_ text: String) -> String {
        let trimmed = text.trimmingCharacters(in: .whitespacesAndNewlines)
        return about.marks.filter { $0.count > 1 }.reduce(trimmed) { said, mark in
            said.replacingOccurrences(of: mark, with: mark.prefix(1) + "\u{200B}" + mark.dropFirst())
        }
    }
}
