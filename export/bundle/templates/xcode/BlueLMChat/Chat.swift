import Foundation

/// A conversation with the model; greedy, as the artifact was judged.
protocol Chat: AnyObject, Sendable {
    /// Stream the answer to `show`; returns the speed.
    func answer(_ question: String, show: @escaping (String) -> Void) async throws -> String
}

/// What was said, and the seconds since this was made, as a chat tells them.
struct Speed {
    private let started = Date()

    func tell(_ count: Int, of what: String = "tokens") -> String {
        String(format: "%d %@, %.1f %@/s", count, what, Double(count) / -started.timeIntervalSinceNow, what)
    }
}
