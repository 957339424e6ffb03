"use strict";

const at = (id) => document.getElementById(id);
const make = (name, props = {}, ...children) => {
  const element = Object.assign(document.createElement(name), props);
  element.append(...children);
  return element;
};

let model = null; // What /v1/models says.
let messages = []; // Of the conversation so far, as they are sent.
let images = []; // Data URLs that go with the next question.
let running = null; // AbortController of the answer that comes.
let conversation = 0; // Answers to an earlier one are not taken.

const headers = () => {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

async function connect() {
  try {
    const health = await (await fetch("health")).json();
    const answer = await fetch("v1/models", { headers: headers() });
    if (answer.status === 401) throw new Error("this server asks for an API key (Settings)");
    model = (await answer.json()).data[0];
    if (health.status !== "ok") throw new Error(`${model.id}: ${health.status}`);
    const budgets = model.image_tokens;
    at("model").textContent = `${model.id}, ${budgets.join(" or ")} tokens an image`;
    at("budget").hidden = budgets.length < 2;
    at("image_tokens").replaceChildren(...budgets.map((n) => make("option", { value: n, textContent: n })));
  } catch (error) {
    at("model").textContent = error.message;
    setTimeout(connect, 2000);
  }
}

function request() {
  const number = (id) => Number(at(id).value);
  const system = at("system").value.trim();
  const content = [
    ...images.map((url) => ({ type: "image_url", image_url: { url } })),
    { type: "text", text: at("question").value },
  ];
  const budget = at("budget").hidden ? {} : { image_tokens: number("image_tokens") };
  const limit = at("max_tokens").value ? { max_tokens: number("max_tokens") } : {};
  return {
    model: model ? model.id : "",
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      ...messages,
      { role: "user", content },
    ],
    temperature: number("temperature"),
    top_p: number("top_p"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true },
    ...limit,
    ...budget,
  };
}

// Pixels of a drawing's side, twice as many as it is wide.
const SIDE = 512;

// The image as the model sees it: a square, with the grid of what each token covers.
function drawn(url, tokens) {
  const canvas = make("canvas", { width: SIDE, height: SIDE, title: `${tokens} tokens` });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `image in ${tokens} tokens`);
  const picture = new Image();
  picture.onload = () => {
    const context = canvas.getContext("2d");
    const side = Math.max(picture.width, picture.height);
    const scale = SIDE / side;
    context.fillStyle = "#7a7569";
    context.fillRect(0, 0, SIDE, SIDE);
    const width = picture.width * scale;
    const height = picture.height * scale;
    context.drawImage(picture, (SIDE - width) / 2, (SIDE - height) / 2, width, height);
    const cells = Math.sqrt(tokens);
    if (!Number.isInteger(cells)) return; // Tokens that are no squares.
    context.strokeStyle = "rgba(255, 255, 255, 0.55)";
    context.lineWidth = 1.5;
    for (let cell = 1; cell < cells; cell += 1) {
      const place = (cell * SIDE) / cells;
      context.beginPath();
      context.moveTo(place, 0);
      context.lineTo(place, SIDE);
      context.moveTo(0, place);
      context.lineTo(SIDE, place);
      context.stroke();
    }
  };
  picture.src = url;
  return canvas;
}

function show(kind, text, urls = []) {
  const tokens = model ? (at("budget").hidden ? model.image_tokens[0] : Number(at("image_tokens").value)) : 0;
  const said = make("p", { className: "said", textContent: text });
  const item = make("li", { className: kind });
  if (urls.length) item.append(make("div", { className: "images" }, ...urls.map((url) => drawn(url, tokens))));
  item.append(said);
  at("turns").append(item);
  at("form").scrollIntoView({ block: "end" });
  return { item, said };
}

// The events of a stream, one by one.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask() {
  const sent = request();
  const question = sent.messages.at(-1);
  const mine = conversation;
  show("user", at("question").value, images);
  const draft = { text: at("question").value, images };
  at("question").value = "";
  images = [];
  showImages();
  const { item, said } = show("assistant", "");
  const begun = performance.now();
  let first = null;
  let usage = null;
  running = new AbortController();
  busy(true);
  try {
    const answer = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(sent),
      signal: running.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      const text = event.choices.length ? event.choices[0].delta.content : "";
      if (text) {
        first = first ?? performance.now() - begun;
        said.textContent += text;
        at("form").scrollIntoView({ block: "end" });
      }
    }
    if (mine === conversation) accept(question, said.textContent);
  } catch (error) {
    if (mine !== conversation) return;
    if (error.name === "AbortError" && said.textContent) {
      accept(question, said.textContent);
    } else {
      item.className = "error";
      said.textContent = error.name === "AbortError" ? "stopped" : error.message;
      // What was asked can be asked again.
      at("question").value = at("question").value || draft.text;
      images = images.length ? images : draft.images;
      showImages();
    }
  } finally {
    running = null;
    busy(false);
  }
  if (usage) {
    const details = usage.prompt_tokens_details;
    item.append(
      make("p", {
        className: "measures",
        textContent:
          `${usage.prompt_tokens} tokens in (${details.image_tokens} of images, ${details.cached_tokens} cached), ` +
          `${usage.completion_tokens} out; first token after ${((first ?? 0) / 1000).toFixed(2)} s, ` +
          `all after ${((performance.now() - begun) / 1000).toFixed(2)} s`,
      }),
    );
  }
}

function accept(question, text) {
  messages = [...messages, question, { role: "assistant", content: text }];
}

function busy(is) {
  at("ask").disabled = is;
  at("stop").hidden = !is;
  if (!is) at("question").focus();
}

function showImages() {
  at("hint").hidden = images.length > 0;
  at("shown").replaceChildren(
    ...images.map((url, number) => {
      const remove = make("button", { type: "button", textContent: "Remove" });
      remove.onclick = (event) => {
        event.stopPropagation();
        images = images.filter((_, other) => other !== number);
        showImages();
      };
      return make("li", {}, make("img", { src: url, alt: `image ${number + 1}` }), remove);
    }),
  );
}

function add(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.onload = () => {
      images = [...images, reader.result];
      showImages();
    };
    reader.readAsDataURL(file);
  }
}

async function copyCurl() {
  const body = JSON.stringify({ ...request(), stream: false, stream_options: undefined });
  const key = at("key").value ? ` \\\n  -H 'Authorization: Bearer KEY'` : "";
  const url = new URL("v1/chat/completions", location.href).href;
  // An image is longer than one argument may be, so the body comes over stdin.
  const head = `curl ${url} \\\n  -H 'Content-Type: application/json'${key} -d @- <<'END'\n`;
  const text = `${head}${body}\nEND\n`;
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    at("curl").textContent = "Copied";
    setTimeout(() => { at("curl").textContent = "Copy as curl"; }, 1500);
  } else {
    // A page that did not come over https or from this machine has no clipboard.
    show("assistant", text);
  }
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) ask();
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running && running.abort());
at("restart").addEventListener("click", () => {
  if (running) running.abort();
  conversation += 1;
  messages = [];
  images = [];
  at("turns").replaceChildren();
  showImages();
});
at("curl").addEventListener("click", copyCurl);
at("key").addEventListener("change", connect);
const drop = at("drop");
drop.addEventListener("click", () => at("files").click());
drop.addEventListener("keydown", (event) => {
  if (event.target === drop && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    at("files").click();
  }
});
at("files").addEventListener("change", () => {
  add(at("files").files);
  at("files").value = "";
});
document.addEventListener("paste", (event) => add(event.clipboardData.files));
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  add(event.dataTransfer.files);
});
connect();
