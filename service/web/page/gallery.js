/** All photos as a strip: each with its label, or with what was wrong with it. */

import { byId, make } from "./dom.js";
import { percent } from "./numbers.js";

/**
 * @typedef {object} Photo
 * @property {number} id
 * @property {string} name
 * @property {File | null} file null: the service has fetched the photo, and this page cannot show it
 * @property {import("./upload.js").Upload} upload of the photo: what the service is asked about
 * @property {string} url of the file, for an `<img>`; empty without a file
 * @property {any} answer the reply to `classify`; null until then
 * @property {import("./api.js").Refusal | null} error
 * @property {import("./api.js").Prediction | null} asked a label that was asked about and is not in the answer
 */

const list = byId("gallery");
/** @type {Map<number, HTMLElement>} */
const items = new Map();

list.addEventListener("keydown", goOn);

/** Arrows go from photo to photo; Tab leaves them. */
function goOn(event) {
  const item = event.target.closest("li");
  const sibling = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" }[event.key];
  const button = sibling && item[sibling]?.querySelector(".open");
  if (!button) return;
  event.preventDefault();
  button.click();
  button.focus();
}

/**
 * Show the photos as they now are.
 * @param {Photo[]} photos
 * @param {Photo | null} current
 * @param {{open: (photo: Photo) => void, remove: (photo: Photo) => void}} acts
 */
export function showGallery(photos, current, acts) {
  byId("intake").classList.toggle("filled", photos.length > 0);
  byId("all").hidden = photos.length < 2;
  for (const [id, item] of items) {
    if (!photos.some((photo) => photo.id === id)) {
      item.remove();
      items.delete(id);
    }
  }
  for (const photo of photos) {
    if (!items.has(photo.id)) list.append(added(photo, acts));
    update(items.get(photo.id), photo, photo === current);
  }
}

function added(photo, acts) {
  const image = make("img", {
    src: photo.url,
    alt: "",
    on: { error: () => image.replaceWith(ending(photo)) },
  });
  const item = make(
    "li",
    { data: { photo: photo.name } },
    make(
      "button",
      { type: "button", class: "open", on: { click: () => acts.open(photo) } },
      make("span", { class: "thumb" }, image),
      make(
        "span",
        { class: "about" },
        make("span", { class: "name" }, photo.name),
        make("span", { class: "told" }),
      ),
    ),
    make(
      "button",
      {
        type: "button",
        class: "remove",
        "aria-label": `Remove ${photo.name}`,
        on: { click: () => acts.remove(photo) },
      },
      "×",
    ),
  );
  items.set(photo.id, item);
  return item;
}

/** The end of a file's name, where the browser cannot show the photo. @param {Photo} photo */
function ending({ name }) {
  return name.match(/\.\w{1,4}$/)?.[0] ?? "";
}

function update(item, photo, isCurrent) {
  const button = item.querySelector(".open");
  if (isCurrent && !button.hasAttribute("aria-current"))
    item.scrollIntoView({ block: "nearest", inline: "nearest" });
  if (isCurrent) button.setAttribute("aria-current", "true");
  else button.removeAttribute("aria-current");
  for (const one of item.querySelectorAll("button")) one.tabIndex = isCurrent ? 0 : -1;
  item.classList.toggle("refused", Boolean(photo.error));
  const told = item.querySelector(".told");
  const text = summary(photo);
  if (told.textContent !== text) told.textContent = text;
  told.title = photo.error ? text : "";
}

/** Put the focus on a photo; on the way to another one, where there is none. @param {Photo | null} photo */
export function focusOn(photo) {
  (items.get(photo?.id)?.querySelector("button") ?? byId("choose")).focus();
}

/** One line about a photo. @param {Photo} photo */
export function summary(photo) {
  if (photo.error) return photo.error.message;
  if (photo.upload.isSending && !photo.file) return "fetching";
  if (photo.upload.isSending) return `sending, ${Math.floor(100 * photo.upload.progress)}%`;
  if (!photo.answer) return "…";
  const [best] = photo.answer.predictions;
  const unlike = photo.answer.known === false ? " · unlike its training" : "";
  return best ? `${best.label} ${percent(best.probability)}${unlike}` : "no label";
}
