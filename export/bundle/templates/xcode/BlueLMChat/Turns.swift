import Foundation

/// Chats as the model's template writes them: texts in manifest.json, held against the template when it was made.
struct Turns {
    private let about: ModelBundle.Manifest.Chat
    private let marks: Marks

    init(_ manifest: ModelBundle.Manifest) throws {
        guard let chat = manifest.tokenizer.chat else {
            throw Problem(manifest.tokenizer.chat_note ?? "the manifest tells no chat")
        }
        about = chat
        marks = Marks(manifest)
    }

    /// Texts of the tokens that end an answer.
    var ends: [String] { about.ends }

    /// What stands in front of the model's answer: of a chat that begins, or of one that goes on behind an answer.
    func prompt(_ question: String, begins: Bool) -> String {
        (begins ? about.first : about.next) + marks.plain(question) + about.answer
    }
}
