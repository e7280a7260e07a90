import Foundation

/// What every runtime offers: tokens in, logits of the last token out; the cache is the engine's own.
protocol Engine: AnyObject {
    var context: Int { get }
    var position: Int { get }
    func reset() throws
    func advance(_ tokens: [Int]) throws -> [Float]
}

/// Turns of a conversation through an engine; greedy, as the artifact was judged.
final class Chat: @unchecked Sendable {
    let title: String
    private let tokenizer: Tokenizer
    private let engine: Engine
    private let about: ModelBundle.Manifest.Tokenizer
    private let reserve = 32

    init(_ bundle: ModelBundle) throws {
        about = bundle.manifest.tokenizer
        guard let file = about.files.first(where: { $0.hasSuffix("tokenizer.model") }) else {
            throw Problem("the app reads tokenizer.model, and the bundle has none")
        }
        tokenizer = try Tokenizer([UInt8](bundle.read(file)))
        engine = try openEngine(bundle)
        title = bundle.manifest.name
    }

    /// Stream the answer to `show`; returns the speed.
    func answer(_ question: String, show: (String) -> Void) throws -> String {
        var prompt = engine.position == 0 ? begin(question) : tokenizer.turn(question)
        if engine.position + prompt.count + reserve > engine.context {
            try engine.reset()
            prompt = begin(question)
        }
        var stream = TextStream(tokenizer)
        var logits = try engine.advance(prompt)
        let started = Date()
        var count = 0
        while engine.position < engine.context {
            let token = logits.indices.max { logits[$0] < logits[$1] } ?? 0
            logits = try engine.advance([token])
            if about.eos_token_ids.contains(token) { break }
            show(stream.push(token))
            count += 1
        }
        return String(format: "%d tokens, %.1f tokens/s", count, Double(count) / -started.timeIntervalSinceNow)
    }

    private func begin(_ question: String) -> [Int] { [about.bos_token_id] + tokenizer.turn(question) }
}
