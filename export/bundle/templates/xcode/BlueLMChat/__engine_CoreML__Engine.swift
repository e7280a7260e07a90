import CoreML
import Foundation

/// Core ML packages with the functions `prefill` (a chunk of tokens) and `decode` (one token); the cache is their state.
///
/// Inputs: tokens int32 [1, T] or hidden [1, T, hidden], position int32 [1]; outputs: hidden_out or logits.
final class CoreMLEngine: Engine {
    let context: Int
    private(set) var position = 0
    private let chunk: Int
    private var prefill: [MLModel] = []
    private var decode: [MLModel] = []
    private var states: [MLState] = []

    init(_ bundle: ModelBundle) throws {
        context = bundle.manifest.context
        chunk = bundle.manifest.prefill_chunk
        for package in bundle.packages(".mlpackage") {
            let compiled = try MLModel.compileModel(at: package)
            prefill.append(try Self.open(compiled, "prefill"))
            decode.append(try Self.open(compiled, "decode"))
        }
        if decode.isEmpty { throw Problem("the bundle has no .mlpackage") }
        reset()
    }

    private static func open(_ compiled: URL, _ function: String) throws -> MLModel {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = .all
        configuration.functionName = function
        return try MLModel(contentsOf: compiled, configuration: configuration)
    }

    func reset() {
        states = decode.map { $0.makeState() }
        position = 0
    }

    func advance(_ tokens: [Int]) throws -> [Float] {
        var logits: [Float] = []
        var done = 0
        while done < tokens.count {
            let count = min(chunk, tokens.count - done)
            // the last chunk ends at the context's end: single tokens where a whole chunk has no room
            let whole = count > 1 && position + chunk <= context
            let take = whole ? count : 1
            logits = try step(Array(tokens[done..<(done + take)]), whole ? prefill : decode, whole ? chunk : 1)
            done += take
        }
        return logits
    }

    private func step(_ tokens: [Int], _ models: [MLModel], _ width: Int) throws -> [Float] {
        if position + tokens.count > context { throw Problem("the context of \(context) tokens is full") }
        let ids = try MLMultiArray(shape: [1, NSNumber(value: width)], dataType: .int32)
        for i in 0..<width { ids[i] = NSNumber(value: i < tokens.count ? tokens[i] : 0) }
        let place = try MLMultiArray(shape: [1], dataType: .int32)
        place[0] = NSNumber(value: position)
        var name = "tokens", value = MLFeatureValue(multiArray: ids)
        for (model, state) in zip(models, states) {
            let inputs = try MLDictionaryFeatureProvider(dictionary: [name: value, "position": place])
            let outputs = try model.prediction(from: inputs, using: state)
            name = outputs.featureNames.contains("logits") ? "logits" : "hidden"
            guard let next = outputs.featureValue(for: name == "logits" ? name : "hidden_out") else {
                throw Problem("the model gives neither logits nor hidden_out")
            }
            value = next
        }
        guard name == "logits", let all = value.multiArrayValue else { throw Problem("the model gives no logits") }
        position += tokens.count
        let vocabulary = all.shape[2].intValue, first = (tokens.count - 1) * vocabulary
        return (0..<vocabulary).map { all[first + $0].floatValue }
    }
}

func openChat(_ bundle: ModelBundle) async throws -> Chat { try TokenLoop(bundle, CoreMLEngine(bundle)) }
