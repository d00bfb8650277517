"use strict";
// The link holds the rater's token behind the #, where it reaches neither the server's log nor another site.
const $ = q => document.querySelector(q), link = new URLSearchParams(location.hash.slice(1));
const AGAIN = 300, LONGEST = 8000, SETTLE = 250, SEEN = 160;   // ms: first and longest pause before another attempt; how long a new pair takes no answer; how long a choice is seen
let token = link.get("rater") || "", state = null, busy = false, ready = 0, begun = false, ahead = [];

const sleep = ms => new Promise(go => setTimeout(go, ms));
const say = text => { $("#status").textContent = text; };
const view = name => { document.body.dataset.view = name; };

async function call(path, body) {   // until the server has answered: what it acknowledged is on its disk
  for (let pause = AGAIN;; pause = Math.min(2*pause, LONGEST)) {
    try {
      const r = await fetch(path, {method: "POST", cache: "no-store", signal: AbortSignal.timeout(15000), body: JSON.stringify(body || {}),
                                   headers: {"Authorization": "Bearer " + token, "Content-Type": "application/json"}});
      if (r.status < 500 && r.status != 429) { const told = await r.json(); say(""); return [r.status, told]; }
    } catch (e) { /* no answer: ask again */ }
    say("No answer from the server. Your answer is kept here and sent again …");
    await sleep(pause);
  }
}

function refused(why) { $("#why").textContent = why || "Ask whoever sent it for another."; view("problem"); }

async function send(path, body) {   // true: there is a state to show
  const [status, told] = await call(path, body);
  if (status == 401 || status == 403) { refused(told.why); return false; }
  if (status == 200) state = told;
  else if (told.state) { state = told.state; say("This was answered already, perhaps in another window."); setTimeout(() => say(""), 2500); }   // where things stand
  return Boolean(state);
}

function element(name, className, text) {
  const e = document.createElement(name);
  if (className) e.className = className;
  if (text) e.textContent = text;      // as text and never as HTML: captions are anybody's
  return e;
}

function answer_button(parent, value, className, key, text) {
  const b = element("button", className);
  b.type = "button"; b.dataset.answer = value;
  b.addEventListener("click", e => { if (e.detail) b.blur(); answer(value); });   // else the space bar would press it again
  parent.append(b);
  if (text) { const label = element("span", "key"); if (key) label.append(element("kbd", "", key), " "); label.append(text); b.append(label); }
  return b;
}

function picture(parent, url, number) {
  const img = element("img"); img.alt = number ? "Picture " + number : "The picture"; img.draggable = false; img.decoding = "async";
  parent.prepend(img);
  return new Promise(go => {
    img.onload = () => { img.classList.toggle("tiny", Math.max(img.naturalWidth, img.naturalHeight) <= 160); go(true); };
    img.onerror = () => { parent.classList.add("broken"); go(false); };
    img.src = url;
  });
}

async function show() {
  const task = state.tasks[0], pair = state.answers.length == 0;
  for (const e of document.querySelectorAll(".ask")) e.textContent = state.question;
  $(".intro .help").textContent = state.help;
  for (const e of document.querySelectorAll("#hints .pair")) e.hidden = !pair;
  for (const e of document.querySelectorAll("#hints .scale")) e.hidden = pair;
  $("#bar").max = Math.max(1, state.total); $("#bar").value = state.done;
  $("#count").textContent = state.done + " of " + state.total;
  $("#undo").disabled = !state.undo;
  document.body.classList.toggle("rate", !pair);
  if (!task) { $("#kept").textContent = !state.done ? "Others have taken all there is to do. If one of them leaves, there will be more: look in again in half an hour."
    : (state.done == 1 ? "Your answer is kept." : "Your " + state.done + " answers are kept.") + " You can close this page."; return view("done"); }
  if (!begun && !state.done) return view("intro");
  begun = true;
  const pictures = $("#pictures"), answers = $("#answers"), loaded = [];
  ready = Infinity;
  pictures.replaceChildren(); answers.replaceChildren(); document.body.classList.remove("busy");
  $("#text").textContent = task.text; $("#text").scrollTop = 0; $("#text").classList.toggle("long", task.text.length > 120); $("#text").classList.toggle("endless", task.text.length > 320);
  if (pair) {
    loaded.push(picture(answer_button(pictures, "left", "picture", "←", "This one"), task.pictures[0], 1));
    loaded.push(picture(answer_button(pictures, "right", "picture", "→", "This one"), task.pictures[1], 2));
    answer_button(answers, "tie", "", "space", "No difference");
  } else {
    const card = element("div", "picture"); pictures.append(card); loaded.push(picture(card, task.pictures[0], 0));
    state.answers.forEach((text, i) => { const b = answer_button(answers, String(i + 1), ""); b.append(element("b", "", String(i + 1)), element("span", "", text)); });
  }
  document.body.dataset.task = task.id; view("task");
  const whole = await Promise.all(loaded);
  if (state.tasks[0] !== task) return;   // another came meanwhile
  if (whole.every(Boolean)) ready = performance.now() + SETTLE;
  else say("A picture did not load. Reload the page to try again.");
  ahead = state.tasks.slice(1).flatMap(t => t.pictures.map(url => { const i = new Image(); i.src = url; return i; }));
  document.body.dataset.ready = task.id;
}

async function answer(value) {
  const task = state && state.tasks[0];
  if (busy || !task || document.body.dataset.view != "task" || performance.now() < ready) return;
  busy = true; document.body.classList.add("busy");
  for (const b of document.querySelectorAll("[data-answer]")) b.classList.toggle("chosen", b.dataset.answer == value);
  const [go] = await Promise.all([send("/api/vote", {id: task.id, turn: task.turn, answer: value}), sleep(SEEN)]);
  busy = false;
  if (go) show();
}

async function undo() {
  if (busy || !state || !state.undo) return;
  busy = begun = true; document.body.classList.add("busy");
  const go = await send("/api/undo", state.undo);
  busy = false;
  if (go) show();
}

function begin() { begun = true; show(); }

addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.repeat) return;
  const where = document.body.dataset.view, rate = document.body.classList.contains("rate"), at = document.activeElement;
  if (["Enter", " "].includes(e.key) && at && at.tagName == "BUTTON") return;   // who got there with the tab key presses that button
  if (e.key == "Backspace" || e.key == "z" || e.key == "u") { e.preventDefault(); return undo(); }
  if (where == "intro" && ["Enter", " "].includes(e.key)) { e.preventDefault(); return begin(); }
  if (where != "task") return;
  const value = rate ? (/^[1-5]$/.test(e.key) ? e.key : null)
    : {ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", " ": "tie", 3: "tie", ArrowDown: "tie"}[e.key];
  if (value) { e.preventDefault(); answer(value); }
});
$("#undo").addEventListener("click", e => { if (e.detail) e.currentTarget.blur(); undo(); });
$("#start").addEventListener("click", begin);
addEventListener("hashchange", () => location.reload());
addEventListener("pageshow", e => { if (e.persisted) location.reload(); });

(async () => {
  if (!token && link.get("join")) {   // an invitation: the nonce makes a second attempt the same rater
    const nonce = sessionStorage.nonce || (sessionStorage.nonce = Array.from(crypto.getRandomValues(new Uint8Array(16)), b => b.toString(16).padStart(2, "0")).join(""));
    const [status, told] = await call("/api/join", {invitation: link.get("join"), nonce});
    if (status != 200) return refused(told.why);
    token = told.token;
    history.replaceState(null, "", "#rater=" + token);   // so that a reload, or the link in another window, is the same rater
  }
  if (!token) return refused("It has no token in it: open the whole link, up to its last letter.");
  if (await send("/api/state")) show();
})();
