import Foundation

/// What every runtime offers: tokens in, logits of the last token out; the cache is the engine's own.
protocol Engine: AnyObject {
    var context: Int { get }
    var position: Int { get }
    func reset() throws
    func advance(_ tokens: [Int]) throws -> [Float]
}

/// A conversation through an engine of tokens, with a tokenizer of the app's own.
final class TokenLoop: Chat, @unchecked Sendable {
    private let tokenizer: Tokenizer
    private let engine: Engine
    private let about: ModelBundle.Manifest.Tokenizer
    private let reserve = 32

    init(_ bundle: ModelBundle, _ engine: Engine) throws {
        about = bundle.manifest.tokenizer
        tokenizer = try Tokenizer([UInt8](Data(contentsOf: bundle.tokenizer("tokenizer.model"))))
        self.engine = engine
    }

    func answer(_ question: String, show: @escaping (String) -> Void) async throws -> String {
        var prompt = engine.position == 0 ? begin(question) : tokenizer.turn(question)
        if engine.position + prompt.count + reserve > engine.context {
            try engine.reset()
            prompt = begin(question)
        }
        var stream = TextStream(tokenizer)
        var logits = try engine.advance(prompt)
        let speed = Speed()
        var count = 0
        while engine.position < engine.context {
            let token = logits.indices.max { logits[$0] < logits[$1] } ?? 0
            logits = try engine.advance([token])
            if about.eos_token_ids.contains(token) { break }
            show(stream.push(token))
            count += 1
        }
        return speed.tell(count)
    }

    private func begin(_ question: String) -> [Int] {
        [about.bos_token_id].compactMap { $0 } + tokenizer.turn(question)
    }
}
