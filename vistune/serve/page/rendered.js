// An answer's text as nodes: paragraphs, lists, code, tables, emphasis. Nothing of it is ever read as HTML, no picture
// and no address in it is fetched; a link is one only to http and https, and shows where it goes.

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^`]*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const UNDER_HEADS = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 8;

/** A fragment to be put into the page. */
export function rendered(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function make(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function blocks(lines, depth) {
  const found = document.createDocumentFragment();
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const [node, next] = block(lines, at, depth);
    found.append(node);
    at = next;
  }
  return found;
}

/** The block that begins at a line, and where the next may begin. */
function block(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return fenced(lines, at);
  const heading = HEADING.exec(line);
  if (heading) return [make(`h${Math.min(heading[1].length + 2, 6)}`, inline(heading[2])), at + 1];
  if (RULE.test(line)) return [make("hr"), at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quoted(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return listed(lines, at, depth);
  if (isTable(lines, at)) return tabled(lines, at);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !begins(lines, end)) end++;
  return [paragraph(lines.slice(at, end)), end];
}

function begins(lines, at) {
  return [FENCE, HEADING, QUOTE, RULE, ITEM].some((mark) => mark.test(lines[at])) || isTable(lines, at);
}

function paragraph(lines) {
  const node = make("p");
  lines.forEach((line, place) => node.append(...(place ? [make("br")] : []), inline(line.trim())));
  return node;
}

function fenced(lines, at) {
  const [, marks, language] = FENCE.exec(lines[at]);
  const closes = (line) => line.trim().startsWith(marks) && !line.trim().replaceAll(marks[0], "");
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end++;
  const code = make("code", lines.slice(at + 1, end).join("\n"));
  if (language) code.dataset.language = language;
  const held = make("pre", code);
  held.tabIndex = 0;
  return [held, end + 1];
}

function quoted(lines, at, depth) {
  const inside = [];
  while (at < lines.length && QUOTE.test(lines[at])) inside.push(QUOTE.exec(lines[at++])[1]);
  return [make("blockquote", blocks(inside, depth + 1)), at];
}

/** Items of one depth; what is indented below an item belongs to it. */
function listed(lines, at, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const list = make(ordered ? "ol" : "ul");
  if (ordered && parseInt(mark, 10) !== 1) list.start = parseInt(mark, 10);
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length > indent.length + 1 || item[1].length < indent.length || /\d/.test(item[2]) !== ordered) break;
    const inside = [item[3]];
    at++;
    while (at < lines.length && belongs(lines, at, indent.length)) inside.push(lines[at++].replace(/^( {1,4}|\t)/, ""));
    list.append(made(inside, depth));
    while (at < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1] || "")) at++;
  }
  return [list, at];
}

function belongs(lines, at, indent) {
  const line = lines[at];
  if (!line.trim()) return (lines[at + 1] || "").search(/\S/) > indent + 1;
  return line.search(/\S/) > indent + 1 || (!begins(lines, at) && Boolean(lines[at - 1].trim()));
}

/** An item of one paragraph has its words without one around them. */
function made(inside, depth) {
  const held = blocks(inside, depth + 1);
  const first = held.firstElementChild;
  if (first?.tagName === "P") first.replaceWith(...first.childNodes);
  return make("li", held);
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && lines[at + 1].includes("|") &&
    UNDER_HEADS.test(lines[at + 1]);
}

function tabled(lines, at) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
  const row = (line, name) => make("tr", ...cells(line).map((cell) => make(name, cell)));
  const body = make("tbody");
  const table = make("table", make("thead", row(lines[at], "th")), body);
  for (at += 2; at < lines.length && lines[at].includes("|"); at++) body.append(row(lines[at], "td"));
  const held = make("div", table);
  held.className = "scroll";
  held.tabIndex = 0;
  return [held, at];
}

const PIECES = new RegExp(
  [
    "(?<tick>`+)(?<code>[^`]+?)\\k<tick>(?!`)",
    "\\*\\*(?<bold>(?=\\S)[^*]+?(?<=\\S))\\*\\*",
    "(?<![\\w*])\\*(?<italic>(?=\\S)[^*]+?(?<=\\S))\\*(?![\\w*])",
    "(?<!\\w)_(?<under>(?=\\S)[^_]+?(?<=\\S))_(?!\\w)",
    "~~(?<struck>(?=\\S)[^~]+?(?<=\\S))~~",
    "(?<!!)\\[(?<label>[^\\[\\]]{1,400})\\]\\((?<to>https?://[^\\s()<>]{1,2000})\\)",
  ].join("|"),
  "g",
);

function inline(text) {
  const found = document.createDocumentFragment();
  let from = 0;
  for (const match of text.matchAll(PIECES)) {
    found.append(text.slice(from, match.index), piece(match.groups));
    from = match.index + match[0].length;
  }
  found.append(text.slice(from));
  return found;
}

function piece({ code, bold, italic, under, struck, label, to }) {
  if (code !== undefined) return make("code", code);
  if (bold !== undefined) return make("strong", inline(bold));
  if (struck !== undefined) return make("s", inline(struck));
  if (label === undefined) return make("em", inline(italic ?? under));
  return link(label, to);
}

function link(label, to) {
  const host = hostOf(to);
  if (!host) return document.createTextNode(`[${label}](${to})`);
  const node = make("a", label);
  node.href = to;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  node.title = to;
  if (label === to) return node;
  return make("span", node, ` (${host})`);
}

function hostOf(to) {
  try {
    return new URL(to).host;
  } catch {
    return "";
  }
}
