import CryptoKit
import Foundation

struct Problem: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

/// The model folder that the app carries; every file is checked against manifest.json before it is used.
struct ModelBundle {
    struct Manifest: Decodable {
        struct File: Decodable {
            let bytes: Int
            let sha256: String
        }
        struct Chat: Decodable {
            let first: String
            let answer: String
            let next: String
            let ends: [String]
        }
        struct Tokenizer: Decodable {
            let files: [String]
            let bos_token_id: Int?
            let eos_token_ids: [Int]
            let chat: Chat?
            let chat_note: String?
            let marks: [String]?
            let template: String?
        }
        let name: String
        let context: Int
        let prefill_chunk: Int
        let tokenizer: Tokenizer
        let files: [String: File]
    }

    let home: URL
    let manifest: Manifest

    init() throws {
        guard let resources = Bundle.main.resourceURL else { throw Problem("the app has no resources") }
        home = resources.appendingPathComponent("Model")
        let raw = try Data(contentsOf: home.appendingPathComponent("manifest.json"))
        manifest = try JSONDecoder().decode(Manifest.self, from: raw)
        for (path, file) in manifest.files { try check(path, file) }
    }

    private func check(_ path: String, _ file: Manifest.File) throws {
        let data = try Data(contentsOf: url(path), options: .alwaysMapped)
        var digest = SHA256()
        digest.update(data: data)
        let found = digest.finalize().map { String(format: "%02x", $0) }.joined()
        if data.count != file.bytes || found != file.sha256 { throw Problem("\(path) was changed: refused") }
    }

    func url(_ path: String) -> URL { home.appendingPathComponent(path) }

    /// The first of these tokenizer files that the model has.
    func tokenizer(_ names: String...) throws -> URL {
        for name in names {
            if let path = manifest.tokenizer.files.first(where: { $0.hasSuffix("/" + name) }) { return url(path) }
        }
        throw Problem("the model has no \(names.joined(separator: " and no "))")
    }

    /// Folders that end in `suffix`, in the order of their names.
    func packages(_ suffix: String) -> [URL] {
        let folders = manifest.files.keys.compactMap { path -> String? in
            guard let range = path.range(of: suffix + "/") else { return nil }
            return String(path[..<range.lowerBound]) + suffix
        }
        return Set(folders).sorted().map(url)
    }

    func first(withSuffix suffix: String) throws -> URL {
        guard let path = manifest.files.keys.sorted().first(where: { $0.hasSuffix(suffix) }) else {
            throw Problem("the model has no \(suffix) file")
        }
        return url(path)
    }
}
