// Server-sent events out of a stream of bytes, wherever it was cut. Knows nothing of what they say.

/** Bytes in, events out. Ends of lines are \n, \r\n or \r; a character of UTF-8 may come in two pieces. */
export class Events {
  #decoder = new TextDecoder("utf-8"); // takes a mark of byte order away
  #line = "";
  #data = [];
  #type = "";
  #afterReturn = false;

  /** The events that are whole with these bytes: [{type, data}]. */
  push(bytes) {
    return this.#take(this.#decoder.decode(bytes, { stream: true }));
  }

  /** What was left when the stream ended: an event without its empty line is none, as the standard says. */
  end() {
    return this.#take(this.#decoder.decode());
  }

  #take(text) {
    const found = [];
    let start = 0;
    for (let at = 0; at < text.length; at++) {
      const mark = text[at];
      if (mark === "\n" && this.#afterReturn) {
        start = at + 1;
      } else if (mark === "\n" || mark === "\r") {
        this.#ended(this.#line + text.slice(start, at), found);
        this.#line = "";
        start = at + 1;
      }
      this.#afterReturn = mark === "\r";
    }
    this.#line += text.slice(start);
    return found;
  }

  #ended(line, found) {
    if (line === "") {
      if (this.#data.length) found.push({ type: this.#type || "message", data: this.#data.join("\n") });
      this.#data = [];
      this.#type = "";
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.#data.push(value);
    if (field === "event") this.#type = value;
  }
}

/** The events of a ReadableStream. When the asker stops listening, the stream is cancelled: the server hears of it. */
export async function* events(stream) {
  const reader = stream.getReader();
  const parser = new Events();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      yield* done ? parser.end() : parser.push(value);
      if (done) return;
    }
  } finally {
    await reader.cancel().catch((error) => console.info("already closed:", error.name));
  }
}
