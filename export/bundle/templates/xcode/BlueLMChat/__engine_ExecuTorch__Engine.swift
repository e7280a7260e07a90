import ExecuTorch
import Foundation

/// A .pte with `forward(tokens int64 [1, T], input_pos int64 [1]) -> logits [1, T, vocab]`; its cache is inside.
final class ExecuTorchEngine: Engine {
    let context: Int
    private(set) var position = 0
    private let chunk: Int
    private let module: Module

    init(_ bundle: ModelBundle) throws {
        context = bundle.manifest.context
        chunk = bundle.manifest.prefill_chunk
        module = Module(filePath: try bundle.first(withSuffix: ".pte").path)
        try module.load("forward")
    }

    func reset() { position = 0 }

    func advance(_ tokens: [Int]) throws -> [Float] {
        var logits: [Float] = []
        var done = 0
        while done < tokens.count {
            let count = min(chunk, tokens.count - done)
            if position + count > context { throw Problem("the context of \(context) tokens is full") }
            let ids = Tensor<Int64>(tokens[done..<(done + count)].map(Int64.init), shape: [1, count])
            let place = Tensor<Int64>([Int64(position)])
            let output: Tensor<Float> = try module.forward(ids, place)
            let vocabulary = output.count / count
            logits = output.scalars().suffix(vocabulary)
            position += count
            done += count
        }
        return logits
    }
}

func openEngine(_ bundle: ModelBundle) throws -> Engine { try ExecuTorchEngine(bundle) }
