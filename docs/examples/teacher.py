"""A teacher for streamopd in plain Python: python teacher.py MODEL_FOLDER [PORT [HOST]]. Needs torch and transformers."""
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, port, host = (*sys.argv[1:], *("8001", "127.0.0.1")[len(sys.argv) - 2 :])
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
names = {index: token for token, index in AutoTokenizer.from_pretrained(folder).get_vocab().items()}
size = model.get_output_embeddings().weight.shape[0]
INFO = {"contract": 1, "model": folder, "vocab_size": size, "max_tokens": 4096}
SHOWN = {"/info": INFO, "/vocabulary": {"tokens": [names.get(i) for i in range(size)]}}


@torch.inference_mode()
def score(item, want):
    context, answer = item["context_ids"], item["completion_ids"]
    logits = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]  # row g predicts answer token g
    logp = logits.log_softmax(-1).clamp(min=-1e4)
    said = {"logprobs": logp.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()}
    if want.get("whole"):
        said["vocab_logprobs"] = logp.tolist()
    if want.get("topk"):
        top = logp.topk(min(want["topk"], size))
        said |= {"topk_ids": top.indices.tolist(), "topk_logprobs": top.values.tolist()}
    if "support_ids" in item:
        said["support_logprobs"] = logp.gather(1, torch.tensor(item["support_ids"]).clamp(min=0)).tolist()
    return said


class Teacher(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(SHOWN[self.path])

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply({"scores": [score(item, asked.get("want", {})) for item in asked["items"]]})

    def reply(self, message):
        body = json.dumps(message).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


ThreadingHTTPServer((host, int(port)), Teacher).serve_forever()
