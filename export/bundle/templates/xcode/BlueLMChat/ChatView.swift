import SwiftUI

struct Line: Identifiable {
    let id = UUID()
    let mine: Bool
    var text: String
}

/// What the view shows; the model works on a task of its own.
@MainActor
final class Conversation: ObservableObject {
    @Published var lines: [Line] = []
    @Published var busy = true
    private var chat: Chat?

    func load() async {
        do {
            let bundle = try await Task.detached { try ModelBundle() }.value
            chat = try await Task.detached { try await openChat(bundle) }.value
            lines.append(Line(mine: false, text: bundle.manifest.name))
            busy = false
        } catch {
            lines.append(Line(mine: false, text: "\(error)"))
        }
    }

    func ask(_ question: String) async {
        guard let chat else { return }
        busy = true
        lines.append(Line(mine: true, text: question))
        lines.append(Line(mine: false, text: ""))
        let place = lines.count - 1
        let (pieces, feed) = AsyncStream.makeStream(of: String.self)
        let work = Task.detached { () -> String in
            defer { feed.finish() }
            do {
                return try await chat.answer(question) { feed.yield($0) }
            } catch {
                return "\(error)"
            }
        }
        for await piece in pieces { lines[place].text += piece }
        lines[place].text += "\n(\(await work.value))"
        busy = false
    }
}

struct ChatView: View {
    @StateObject private var conversation = Conversation()
    @State private var question = ""

    var body: some View {
        VStack {
            ScrollView {
                LazyVStack(alignment: .leading, spacing: 12) {
                    ForEach(conversation.lines) { line in
                        Text(line.text)
                            .foregroundStyle(line.mine ? Color.accentColor : Color.primary)
                            .textSelection(.enabled)
                    }
                }
                .padding()
            }
            HStack {
                TextField("…", text: $question, axis: .vertical).textFieldStyle(.roundedBorder)
                Button("➤") {
                    let asked = question
                    question = ""
                    Task { await conversation.ask(asked) }
                }
                .disabled(conversation.busy || question.isEmpty)
            }
            .padding()
        }
        .task { await conversation.load() }
    }
}
