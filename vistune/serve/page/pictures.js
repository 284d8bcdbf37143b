// Pictures as the server takes them: read by the browser, made smaller only where they are over its caps.
import { digest } from "./digest.js";
import { bytes, number, word } from "./words.js";

const TAKEN = new Set(["image/png", "image/jpeg", "image/webp", "image/gif"]);
const SMALLER = 0.8;
const QUALITY = 0.92;
let last = 0;

/** A picture of a conversation: `blob` is what is sent; `url` shows it. */
export function picture({ blob, name, width, height }) {
  return { id: ++last, blob, name, width, height, url: URL.createObjectURL(blob), nbytes: blob.size };
}

export function forget(one) {
  if (one.url) URL.revokeObjectURL(one.url);
}

/** Bytes that pictures may have together, so that a request of them, in base64, with its text, fits into a body. */
export const roomOf = (limits) => Math.max(0, Math.floor((limits.body - Math.min(limits.body / 8, 1 << 20)) * 0.75));

/** A file as a picture, and what was done to it, in words. Error with words for the reader where it cannot be one. */
export async function read(file, limits, room) {
  const name = file.name || word("picture");
  if (file.type && !file.type.startsWith("image/")) throw new Error(word("no_picture", { name }));
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) throw new Error(word("unreadable", { name }));
  try {
    const { width, height } = bitmap;
    const most = Math.min(limits.picture_bytes, room);
    const small = file.size <= most && width * height <= limits.picture_pixels;
    if (small && TAKEN.has(file.type)) return { made: picture({ blob: file, name, width, height }), notice: "" };
    const made = await fitted(bitmap, file.type, limits.picture_pixels, most);
    if (!made) throw new Error(word("no_room", { name, bytes: bytes(roomOf(limits)) }));
    return { made: picture({ ...made, name }), notice: notice(name, file, bitmap, made, limits) };
  } finally {
    bitmap.close();
  }
}

function notice(name, file, before, made, limits) {
  const size = (one) => `${one.width} × ${one.height}`;
  if (made.width === before.width && TAKEN.has(file.type) === false) {
    return word("recoded", { name, kind: made.blob.type.slice(6), from: file.type.slice(6) || "?" });
  }
  const caps = { pixels: number(limits.picture_pixels / 1e6, 1), bytes: bytes(limits.picture_bytes) };
  const told = (one, nbytes) => `${size(one)}, ${bytes(nbytes)}`;
  return word("shrunk", { name, before: told(before, file.size), after: told(made, made.blob.size), ...caps });
}

/** The picture drawn again, within so many pixels and bytes; null where even a small one is too much. */
async function fitted(bitmap, type, pixels, most) {
  let scale = Math.min(1, Math.sqrt(pixels / (bitmap.width * bitmap.height)));
  const first = /jpe?g|heic|heif|avif/.test(type) ? "image/jpeg" : "image/png";
  for (let kind = first; ; kind = "image/jpeg") {
    const width = Math.max(1, Math.floor(bitmap.width * scale));
    const height = Math.max(1, Math.floor(bitmap.height * scale));
    const blob = await drawn(bitmap, width, height, kind);
    if (blob && blob.size <= most) return { blob, width, height };
    if (kind === "image/jpeg") scale *= blob ? Math.max(0.2, Math.min(SMALLER, Math.sqrt(most / blob.size))) : SMALLER;
    if (Math.max(width, height) < 64) return null;
  }
}

async function drawn(bitmap, width, height, type) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const pen = canvas.getContext("2d");
  if (!pen) return null;
  if (type === "image/jpeg") {
    pen.fillStyle = "#fff"; // what is seen through becomes white, not black
    pen.fillRect(0, 0, width, height);
  }
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, width, height);
  return new Promise((resolve) => canvas.toBlob(resolve, type, QUALITY));
}

/** `data:image/png;base64,...`, made once. */
export async function dataUrl(one) {
  one.data ??= await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(one.blob);
  });
  return one.data;
}

export async function fromDataUrl({ data, name, width, height }) {
  const [, type, base64] = /^data:([\w/+.-]+);base64,(.*)$/s.exec(data);
  const raw = Uint8Array.from(atob(base64), (mark) => mark.charCodeAt(0));
  return { ...picture({ blob: new Blob([raw], { type }), name, width, height }), data };
}

export async function digestOf(one) {
  one.digest ??= await digest(new Uint8Array(await one.blob.arrayBuffer()));
  return one.digest;
}
