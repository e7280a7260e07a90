import Foundation

/// SentencePiece BPE with byte fallback, straight from tokenizer.model, and BlueLM's chat template.
///
/// What a user types is data: marks such as `[|AI|]:` in it are spelled out in ordinary pieces.
struct Tokenizer {
    enum Kind: Int { case normal = 1, unknown, control, userDefined, unused, byte }
    struct Piece {
        var text = ""
        var score: Float = 0
        var kind = Kind.normal
    }

    private static let human = "[|Human|]:", ai = "[|AI|]:", space = "\u{2581}"
    private var pieces: [Piece] = []
    private var ids: [String: Int] = [:]
    private var byteIds = [Int?](repeating: nil, count: 256)
    private var dummyPrefix = true
    private var unknown = 0

    init(_ model: [UInt8]) throws {
        var reader = ProtoReader(model)
        while let field = try reader.next() {
            switch field {
            case 1: try addPiece(reader.bytes())
            case 3: try readNormalizer(reader.bytes())
            default: try reader.skip()
            }
        }
    }

    private mutating func addPiece(_ raw: [UInt8]) throws {
        var reader = ProtoReader(raw), piece = Piece()
        while let field = try reader.next() {
            switch field {
            case 1: piece.text = String(decoding: try reader.bytes(), as: UTF8.self)
            case 2: piece.score = try reader.float()
            case 3: piece.kind = Kind(rawValue: Int(try reader.varint())) ?? .unused
            default: try reader.skip()
            }
        }
        switch piece.kind {
        case .byte: byteIds[Int(piece.text.dropFirst(3).prefix(2), radix: 16) ?? 0] = pieces.count
        case .unknown: unknown = pieces.count
        default: ids[piece.text] = pieces.count
        }
        pieces.append(piece)
    }

    private mutating func readNormalizer(_ raw: [UInt8]) throws {
        var reader = ProtoReader(raw)
        while let field = try reader.next() {
            switch field {
            case 2:
                if try !reader.bytes().isEmpty { throw Problem("this tokenizer normalizes text, which the app cannot") }
            case 3: dummyPrefix = try reader.varint() != 0
            default: try reader.skip()
            }
        }
    }

    /// Tokens of plain text; a piece that is a mark of the template is never used.
    func encode(_ text: String, prefix: Bool? = nil) -> [Int] {
        if text.isEmpty { return [] }
        let spaced = (prefix ?? dummyPrefix ? " " + text : text).replacingOccurrences(of: " ", with: Self.space)
        var symbols = spaced.unicodeScalars.map { String($0) }
        merge(&symbols)
        return symbols.flatMap(emit)
    }

    /// Join the neighbours whose piece has the best score, the leftmost first, until none is a piece.
    private func merge(_ symbols: inout [String]) {
        while true {
            var best: (place: Int, score: Float)?
            for i in symbols.indices.dropLast() {
                guard let id = ids[symbols[i] + symbols[i + 1]], pieces[id].kind == .normal else { continue }
                if pieces[id].score > best?.score ?? -.infinity { best = (i, pieces[id].score) }
            }
            guard let best else { return }
            symbols[best.place] += symbols.remove(at: best.place + 1)
        }
    }

    private func emit(_ symbol: String) -> [Int] {
        if let id = ids[symbol], pieces[id].kind == .normal { return [id] }
        return symbol.utf8.map { byteIds[Int($0)] ?? unknown }
    }

    /// `[|Human|]:…[|AI|]:`: a turn. A mark that is one piece is its token, else it is spelled out.
    func turn(_ question: String) -> [Int] {
        guard let human = mark(Self.human), let ai = mark(Self.ai) else {
            return encode(Self.human + question + Self.ai)
        }
        return [human] + encode(question, prefix: false) + [ai]
    }

    private func mark(_ text: String) -> Int? {
        guard let id = ids[text], pieces[id].kind == .userDefined else { return nil }
        return id
    }

    /// Bytes that a token stands for; control tokens have none.
    func bytes(_ token: Int) -> [UInt8] {
        guard pieces.indices.contains(token) else { return [] }
        let piece = pieces[token]
        switch piece.kind {
        case .control, .unknown: return []
        case .byte: return [UInt8(piece.text.dropFirst(3).prefix(2), radix: 16) ?? 0]
        default: return Array(piece.text.replacingOccurrences(of: Self.space, with: " ").utf8)
        }
    }
}

/// Text of tokens as they come; a UTF-8 character is held back until its last byte is there.
struct TextStream {
    private let tokenizer: Tokenizer
    private var held: [UInt8] = []

    init(_ tokenizer: Tokenizer) { self.tokenizer = tokenizer }

    mutating func push(_ token: Int) -> String {
        held += tokenizer.bytes(token)
        var whole = held.count
        for back in stride(from: 1, through: min(3, held.count), by: 1) {
            let byte = held[held.count - back]
            if byte & 0xC0 == 0x80 { continue }
            let needed = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1
            if needed > back { whole = held.count - back }
            break
        }
        defer { held.removeFirst(whole) }
        return String(decoding: held.prefix(whole), as: UTF8.self)
    }
}

/// A reader of protocol buffers' wire format, enough for tokenizer.model.
private struct ProtoReader {
    private let data: [UInt8]
    private var at = 0
    private var wire = 0

    init(_ data: [UInt8]) { self.data = data }

    mutating func next() throws -> Int? {
        if at >= data.count { return nil }
        let key = Int(try varint())
        wire = key & 7
        return key >> 3
    }

    mutating func varint() throws -> UInt64 {
        var value: UInt64 = 0
        for shift in stride(from: UInt64(0), to: 64, by: 7) {
            let byte = UInt64(try take(1)[0])
            value |= (byte & 127) << shift
            if byte & 128 == 0 { return value }
        }
        throw Problem("tokenizer.model is damaged")
    }

    mutating func bytes() throws -> [UInt8] { try take(Int(try varint())) }

    mutating func float() throws -> Float {
        let raw = try take(4)
        return Float(bitPattern: raw.reversed().reduce(UInt32(0)) { $0 << 8 | UInt32($1) })
    }

    mutating func skip() throws {
        switch wire {
        case 0: _ = try varint()
        case 1: _ = try take(8)
        case 2: _ = try bytes()
        case 5: _ = try take(4)
        default: throw Problem("tokenizer.model is damaged")
        }
    }

    private mutating func take(_ count: Int) throws -> [UInt8] {
        guard count >= 0, at + count <= data.count else { throw Problem("tokenizer.model is damaged") }
        defer { at += count }
        return Array(data[at..<(at + count)])
    }
}
