// Asks the server what is next, shows it, sends what is answered. The server keeps everything.
"use strict";

const KEPT = "djepa-rater";
const by = (id) => document.getElementById(id);
let rater = null;
let state = null;
let busy = false;

// The token has become a cookie: not to be read over a shoulder or copied with the address.
if (location.search) history.replaceState(null, "", location.pathname);

function kept() {
  try { return localStorage.getItem(KEPT); } catch { return null; }
}

function keep(name) {
  try { name ? localStorage.setItem(KEPT, name) : localStorage.removeItem(KEPT); } catch { /* a
    browser that keeps nothing asks again */ }
}

function askName() {
  rater = state = null;
  for (const id of ["rate", "finished", "undo", "who", "bar", "progress"]) by(id).hidden = true;
  by("enter").hidden = false;
  by("name").focus();
}

function showPictures(names) {
  const shown = names.map((name, i) => {
    const picture = new Image();
    picture.alt = names.length > 1 ? (i ? "right picture" : "left picture") : "the picture";
    // Few pixels are shown as they are, not blurred by enlarging.
    picture.onload = () => picture.classList.toggle("small", picture.naturalWidth < 256);
    picture.onerror = () => { by("problem").textContent = "This picture cannot be shown."; };
    picture.src = `picture/${name}`;
    return picture;
  });
  by("pictures").replaceChildren(...shown);
}

function show(next) {
  const before = state && state.item;
  state = next;
  rater = next.rater;
  by("rater").textContent = rater;
  by("progress").textContent = `${next.done} / ${next.total}`;
  by("bar").max = next.total;
  by("bar").value = next.done;
  for (const id of ["undo", "who", "bar", "progress"]) by(id).hidden = false;
  by("enter").hidden = true;
  by("rate").hidden = next.item === null;
  by("finished").hidden = next.item !== null;
  if (next.item === null) return;
  by("prompt").textContent = next.prompt;
  if (next.item !== before) showPictures(next.pictures);
  for (const line of by("questions").children) {
    const name = line.dataset.question;
    line.className = name === next.question ? "asked" : name in next.given ? "answered" : "";
    line.querySelector("em").textContent = next.given[name] || "";
  }
  // In the browser's cache before they are asked for.
  for (const name of next.next) new Image().src = `picture/${name}`;
}

async function send(path, body) {
  if (busy) return;
  busy = true;
  try {
    const answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Requested-With": "djepa-rate" },
      body: JSON.stringify(body),
    });
    if (answer.status >= 500) throw new Error("not kept");
    if (!answer.ok) {
      const said = await answer.text();
      let words = said;
      try { words = JSON.parse(said).detail; } catch { /* plain text */ }
      by("problem").textContent = words;
      if (answer.status === 422) { keep(null); askName(); }
      return;
    }
    by("problem").textContent = "";
    show(await answer.json());
    keep(rater);
  } catch {
    by("problem").textContent = rater && state
      ? "The server does not answer, and this answer is not kept yet: try again."
      : "The server does not answer: reload the page.";
  } finally {
    busy = false;
  }
}

function choose(value) {
  if (state && state.item !== null) {
    send("answer", { rater, item: state.item, question: state.question, value });
  }
}

by("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  send("state", { rater: by("name").value });
});
by("change").addEventListener("click", () => { keep(null); askName(); });
by("undo").addEventListener("click", () => { by("undo").blur(); send("undo", { rater }); });
for (const button of by("choices").children) {
  button.addEventListener("click", () => { button.blur(); choose(button.dataset.value); });
}

document.addEventListener("keydown", (event) => {
  // A key held down is one answer; keys with Ctrl or Alt are the browser's.
  if (!state || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "Backspace") {
    event.preventDefault();
    send("undo", { rater });
    return;
  }
  for (const button of by("choices").children) {
    if (button.dataset.keys.split(" ").includes(event.key)) {
      event.preventDefault();
      choose(button.dataset.value);
    }
  }
});

if (kept()) send("state", { rater: kept() });
else askName();
