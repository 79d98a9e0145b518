/** An article on how such a network works. Its pictures are made by the served model, from the opened photo. */

import { byId, loadStyles, make } from "../dom.js";
import { visit } from "../layers.js";
import { FIGURES } from "./figures.js";
import { beginTour, havePhoto } from "./loader.js";
import { Playground } from "./playground.js";
import { Studio } from "./studio.js";
import { SECTIONS, TRAPS } from "./words.js";

/** How near a picture must come before it is made. */
const NEAR = "300px";

/** Sections whose layers have a value for each label. */
const ABOUT_LABELS = ["linear", "softmax"];

const place = byId("learn");
/** @type {Studio | null} */
let studio = null;
/** @type {Map<Element, import("./words.js").Section>} the places of the pictures */
const places = new Map();
/** @type {Map<string, HTMLElement>} the links into the network, by section */
const links = new Map();
const playground = new Playground();
const observer = new IntersectionObserver((seen) => seen.forEach(draw), { rootMargin: NEAR });

/** Put the article onto the page. @param {import("./loader.js").Subject} subject */
export async function build(subject) {
  await loadStyles(new URL("article.css", import.meta.url));
  const sections = SECTIONS.map(section);
  place.replaceChildren(
    make(
      "div",
      { class: "head" },
      make("h2", { id: "learn-title", tabIndex: -1 }, "How an image classifier works"),
      make(
        "p",
        { class: "soft" },
        "About ten minutes. The pictures are made by the model that you have chosen, from your photo or else from a sample. ",
        make("button", { type: "button", class: "again", on: { click: beginTour } }, "Take the tour"),
      ),
    ),
    make(
      "nav",
      { class: "contents", "aria-label": "Sections of the article" },
      make(
        "ol",
        {},
        ...SECTIONS.map(({ id, title }) =>
          make("li", {}, make("a", { href: `#learn-${id}` }, title.split(":")[0])),
        ),
      ),
    ),
    make("div", { class: "body" }, ...sections),
  );
  showSubject(subject);
}

/** Make the pictures of another model or photo. @param {import("./loader.js").Subject} subject */
export function showSubject({ model, photo }) {
  studio?.close();
  studio = model && new Studio(model, photo);
  if (!studio) return;
  for (const one of places.keys()) {
    observer.unobserve(one);
    observer.observe(one); // reports again what is in view
  }
  prepare(studio);
}

/** What needs the network's layers: the links that lead to them, and the playground's settings. */
async function prepare(mine) {
  const layers = await mine.layers().catch(() => []);
  if (mine !== studio) return;
  for (const { id, layer } of SECTIONS) {
    if (layer) links.get(id).hidden = !layer(layers);
  }
  playground.offer(layers);
  const picture = await mine.pixels().catch(() => null);
  if (mine === studio && picture) playground.show(picture);
}

function section(one) {
  const { id, title, text, layer, live, caption } = one;
  const figure = caption
    ? make(
        "figure",
        { class: "picture", data: { picture: id } },
        make("div", { class: "drawing" }),
        make("figcaption", {}, caption),
      )
    : null;
  if (figure) places.set(figure, one);
  const link = layer
    ? make(
        "a",
        { class: "live", href: "#layers", on: { click: (event) => lead(event, id, layer) } },
        `${live} `,
        make("span", { "aria-hidden": "true" }, "↑"),
      )
    : null;
  if (link) links.set(id, link);
  return make(
    "section",
    { id: `learn-${id}`, "aria-labelledby": `learn-${id}-title` },
    make("h3", { id: `learn-${id}-title`, tabIndex: -1 }, title),
    make(
      "div",
      { class: "text" },
      ...text.map((words) => make("p", {}, words)),
      id === "heat" ? traps() : null,
      id === "training" ? make("p", { class: "soft trained" }) : null,
      link,
    ),
    figure,
    id === "window" ? playground.element : null,
  );
}

function traps() {
  return make(
    "ul",
    { class: "traps" },
    ...TRAPS.map(([name, words]) => make("li", {}, make("strong", {}, name), ` ${words}`)),
  );
}

/** Follow a link into the network, with a sample photo if none is open. The browser's "back" leads here again. */
async function lead(event, id, layer) {
  event.preventDefault();
  history.replaceState(history.state, "", `#learn-${id}`);
  await havePhoto();
  visit(layer, ABOUT_LABELS.includes(id) ? await mostProbable() : 0);
}

/** Make the picture that has come near, unless it is that of this model and photo already. */
async function draw({ target, isIntersecting }) {
  const mine = studio;
  const { id } = places.get(target);
  if (!isIntersecting || !mine || mine.drawn.has(id)) return;
  mine.drawn.add(id);
  const drawing = target.querySelector(".drawing");
  target.setAttribute("aria-busy", "true");
  try {
    const content = await FIGURES[id](
      mine,
      SECTIONS.find((one) => one.id === id),
    );
    if (mine !== studio) return;
    drawing.replaceChildren(...content);
    target.classList.toggle("empty", !content.length);
  } catch (error) {
    if (mine !== studio || error.name === "AbortError") return;
    mine.drawn.delete(id);
    drawing.replaceChildren(make("p", { class: "soft" }, `There is no picture here: ${error.message}`));
  }
  target.setAttribute("aria-busy", "false");
}

/** The index of the most probable label. @returns {Promise<number>} */
async function mostProbable() {
  const mine = studio;
  const predictions = await mine.predictions().catch(() => []);
  return mine === studio ? (predictions[0]?.index ?? 0) : mostProbable(); // another photo was opened meanwhile
}
