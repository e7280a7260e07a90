import CoreAILanguageModels
import Foundation
import FoundationModels

/// Core AI in a session of Foundation Models: the folder's tokenizer and template, rendered over all that was said.
final class CoreAIChat: Chat, @unchecked Sendable {
    private let model: CoreAILanguageModel
    private let marks: Marks
    private let context: Int
    private var session: LanguageModelSession

    init(_ bundle: ModelBundle) async throws {
        marks = Marks(bundle.manifest)
        context = bundle.manifest.context
        model = try await CoreAILanguageModel(resourcesAt: bundle.url("artifact/model"))
        session = LanguageModelSession(model: model)
    }

    func answer(_ question: String, show: @escaping (String) -> Void) async throws -> String {
        let options = GenerationOptions(maximumResponseTokens: context)  // its own end is the context's
        let speed = Speed()
        var said = ""
        do {
            for try await snapshot in session.streamResponse(to: marks.plain(question), options: options) {
                show(String(snapshot.content.dropFirst(said.count)))
                said = snapshot.content
            }
        } catch {
            session = LanguageModelSession(model: model)  // the chat is forgotten: it may have filled the context
            throw error
        }
        return speed.tell(said.count, of: "characters")
    }
}

func openChat(_ bundle: ModelBundle) async throws -> Chat { try await CoreAIChat(bundle) }
