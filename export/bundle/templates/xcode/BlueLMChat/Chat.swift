import Foundation

/// A conversation with the model; greedy, as the artifact was judged.
protocol Chat: AnyObject, Sendable {
    /// Stream the answer to `show`; returns the speed.
    func answer(_ question: String, show: @escaping (String) -> Void) async throws -> String
}

/// Tokens and seconds since it was made, as a chat tells them.
struct Speed {
    private let started = Date()

    func tell(_ tokens: Int) -> String {
        String(format: "%d tokens, %.1f tokens/s", tokens, Double(tokens) / -started.timeIntervalSinceNow)
    }
}
