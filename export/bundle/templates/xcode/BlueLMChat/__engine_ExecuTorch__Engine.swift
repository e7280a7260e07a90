import ExecuTorchLLM
import Foundation

/// ExecuTorch's TextRunner: its tokenizer, its loop and its cache; the app gives it the text of each turn.
final class ExecuTorchChat: Chat, @unchecked Sendable {
    private let turns: Turns
    private let context: Int
    private let runner: TextRunner
    private let reserve = 32
    private var held = 0  // tokens in its cache, at most

    init(_ bundle: ModelBundle) throws {
        turns = try Turns(bundle.manifest)
        context = bundle.manifest.context
        let tokenizer = try bundle.tokenizer("tokenizer.json", "tokenizer.model")
        runner = TextRunner(modelPath: try bundle.first(withSuffix: ".pte").path, tokenizerPath: tokenizer.path)
        try runner.load()
    }

    func answer(_ question: String, show: @escaping (String) -> Void) async throws -> String {
        var prompt = turns.prompt(question, begins: held == 0)
        if held > 0 && room(prompt) < reserve {
            forget()
            prompt = turns.prompt(question, begins: true)
        }
        let room = room(prompt)
        if room <= 0 { throw Problem("the question does not fit into the context of \(context) tokens") }
        let config = Config {
            $0.isEchoEnabled = false
            $0.temperature = 0
            $0.maximumNewTokens = room
        }
        var speed = Speed(), said = 0, pieces = 0, ended = false, endsAtOnce = false
        try runner.generate(prompt, config) { [turns, runner] piece in
            if pieces == 0 { speed = Speed() }
            pieces += 1
            if ended {
                endsAtOnce = true  // it does not look at its first token, and would go on behind an end there
                runner.stop()
            } else if turns.ends.contains(piece) {
                ended = true  // the text of the end token, which it says as well
            } else {
                show(piece)
                said += 1
            }
        }
        held = context - room + pieces
        if endsAtOnce { forget() }
        return speed.tell(said)
    }

    /// Tokens that surely fit behind a prompt, whose tokens the runner does not tell: at most one a byte.
    private func room(_ prompt: String) -> Int { context - held - prompt.utf8.count - 1 }

    private func forget() {
        runner.reset()
        held = 0
    }
}

func openChat(_ bundle: ModelBundle) async throws -> Chat { try ExecuTorchChat(bundle) }
