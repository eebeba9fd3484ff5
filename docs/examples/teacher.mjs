// A program as a teacher, in plain Node: node teacher.mjs TOKENIZER.json [PORT [HOST]].
// It knows how the quickstart's sums go on: "7+2-4=" -> "7+2=9-4=5" and then the stop token. No model, no packages.
import { readFileSync } from "node:fs";
import { createServer } from "node:http";

const [file, port = "8001", host = "127.0.0.1"] = process.argv.slice(2);
const tokenizer = JSON.parse(readFileSync(file));
const tokens = [];
for (const [token, id] of Object.entries(tokenizer.model.vocab)) tokens[id] = token;
for (const { content, id } of tokenizer.added_tokens) tokens[id] = content;
const stop = tokens.indexOf("</s>");
const text = (ids) => ids.map((id) => tokens[id]).join("").replace(/<\/?[a-z]+>/g, "");
const value = (sum) => { const [, a, sign, b] = /^(\d+)([+-])(\d+)$/.exec(sum) ?? []; return sign === "-" ? a - b : +a + +b; };

function next(question, written) {                    // the id that comes next, after what the student wrote
  const [first, ...terms] = question.match(/[+-]?\d+/g);
  const parts = written.split("="), done = parts.length - 1;
  const sofar = done ? String(value(parts[done - 1])) : first;
  const right = sofar + (done < terms.length ? terms[done] + "=" : "");
  const here = parts[done], goes_on = sofar !== "NaN" && right.startsWith(here) && right !== here;
  return goes_on ? tokens.indexOf(right[here.length]) : stop;
}

function score({ context_ids, completion_ids, support_ids }, want) {
  const rows = completion_ids.map((_, g) => {         // row g: what it thinks of token g, knowing those before it
    const row = Array(tokens.length).fill(Math.log(0.02 / (tokens.length - 1)));
    row[next(text(context_ids), text(completion_ids.slice(0, g)))] = Math.log(0.98);
    return row;
  });
  const said = { logprobs: rows.map((row, g) => row[completion_ids[g]]) };
  if (want.whole) said.vocab_logprobs = rows;
  if (want.topk) {
    said.topk_ids = rows.map((row) => [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, want.topk));
    said.topk_logprobs = rows.map((row, g) => said.topk_ids[g].map((id) => row[id]));
  }
  if (support_ids) said.support_logprobs = rows.map((row, g) => support_ids[g].map((id) => row[Math.max(id, 0)]));
  return said;
}

createServer(async (request, response) => {
  let body = "";
  for await (const chunk of request) body += chunk;
  const { items, want = {} } = body ? JSON.parse(body) : {};
  const answer = request.url === "/info" ? { contract: 1, model: "a calculator", vocab_size: tokens.length, max_tokens: 4096 }
    : request.url === "/vocabulary" ? { tokens } : { scores: items.map((item) => score(item, want)) };
  response.writeHead(200, { "Content-Type": "application/json" }).end(JSON.stringify(answer));
}).listen(+port, host);
