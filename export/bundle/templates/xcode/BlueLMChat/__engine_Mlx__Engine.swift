import Foundation
import MLXLLM
import MLXLMCommon
import Tokenizers

/// MLX Swift: the folder as mlx-lm reads it, with its tokenizer and the model's template rendered by swift-transformers.
///
/// A `ChatSession` renders a later question as a chat of its own, with what begins a chat once more. So each question
/// gets a session that is given what was said before, and that renders all of it.
final class MlxChat: Chat, @unchecked Sendable {
    private let model: ModelContainer
    private let marks: Marks
    private let context: Int
    private let reserve = 32
    private var said: [MLXLMCommon.Chat.Message] = []
    private var held = 0  // tokens of what was said, and of the template around it

    init(_ bundle: ModelBundle) async throws {
        marks = Marks(bundle.manifest)
        context = bundle.manifest.context
        model = try await loadModelContainer(from: bundle.url("artifact/model"), using: TokenizerFolder())
    }

    func answer(_ question: String, show: @escaping (String) -> Void) async throws -> String {
        let asked = marks.plain(question)
        if !said.isEmpty && room(asked) < reserve {
            said = []
            held = 0
        }
        let room = room(asked)
        if room <= 0 { throw Problem("the question does not fit into the context of \(context) tokens") }
        let session = ChatSession(
            model, history: said, generateParameters: GenerateParameters(maxTokens: room, temperature: 0))
        var answer = "", count = 0
        let speed = Speed()
        for try await part in session.streamDetails(to: asked) {
            if let piece = part.chunk {
                answer += piece
                show(piece)
            }
            if let info = part.info {
                count = info.generationTokenCount
                held = info.promptTokenCount + count
            }
        }
        said += [.user(asked), .assistant(answer)]
        return speed.tell(count)
    }

    /// Tokens that are left behind a question of at most one a byte.
    private func room(_ question: String) -> Int { context - held - question.utf8.count }
}

/// Tokenizers of swift-transformers for mlx-swift-lm.
private struct TokenizerFolder: TokenizerLoader {
    func load(from directory: URL) async throws -> any MLXLMCommon.Tokenizer {
        FolderTokenizer(own: try await AutoTokenizer.from(modelFolder: directory))
    }
}

private struct FolderTokenizer: MLXLMCommon.Tokenizer {
    let own: any Tokenizers.Tokenizer

    var bosToken: String? { own.bosToken }
    var eosToken: String? { own.eosToken }
    var unknownToken: String? { own.unknownToken }

    func encode(text: String, addSpecialTokens: Bool) -> [Int] {
        own.encode(text: text, addSpecialTokens: addSpecialTokens)
    }

    func decode(tokenIds: [Int], skipSpecialTokens: Bool) -> String {
        own.decode(tokens: tokenIds, skipSpecialTokens: skipSpecialTokens)
    }

    func convertTokenToId(_ token: String) -> Int? { own.convertTokenToId(token) }

    func convertIdToToken(_ id: Int) -> String? { own.convertIdToToken(id) }

    func applyChatTemplate(
        messages: [[String: any Sendable]], tools: [[String: any Sendable]]?, additionalContext: [String: any Sendable]?
    ) throws -> [Int] {
        try own.applyChatTemplate(messages: messages, tools: tools, additionalContext: additionalContext)
    }
}

func openChat(_ bundle: ModelBundle) async throws -> Chat { try await MlxChat(bundle) }
