/** The article's way onto the page: it is loaded when somebody follows a link to it, and not before. */

import { sample } from "../api.js";
import { byId, loadStyles } from "../dom.js";

/** Links to the article and its sections begin with this. */
const PREFIX = "#learn";
/** The photo that stands in while the visitor has opened none. */
const STAND_IN = new URL("../samples/ship.jpg", import.meta.url).href;

/** @typedef {{model: import("../api.js").Model | null, photo: import("./studio.js").Photo | null}} Subject */

/** @type {Subject} */
let subject = { model: null, photo: null };
/** @type {Promise<typeof import("./article.js")> | null} */
let loaded = null;
/** @type {(files: File[]) => void} */
let add = () => {};

/**
 * Show the article when its address is followed.
 * @param {(files: File[]) => void} receive takes a sample photo where a link needs one
 */
export function listenForArticle(receive) {
  add = receive;
  window.addEventListener("hashchange", follow);
  byId("tour").addEventListener("click", beginTour);
  byId("tour-skip").addEventListener("click", () => {
    rememberTour();
    byId("choose").focus(); // the button that had the focus is gone
  });
  follow();
}

/** Say what the page is about now; the article's pictures are made of it. @param {Subject["model"]} model @param {Subject["photo"]} photo */
export async function showInArticle(model, photo) {
  if (subject.model === model && subject.photo === photo) return;
  subject = { model, photo };
  if (loaded) (await loaded).showSubject(subject);
}

/** Open a sample photo if none is open, for what the article wants to show. */
export async function havePhoto() {
  if (!subject.photo) add([await standIn()]);
}

/** Show the page's parts one by one. */
export async function beginTour() {
  const [{ startTour }] = await Promise.all([import("./tour.js"), loadStyles(new URL("tour.css", import.meta.url))]);
  await startTour(rememberTour);
}

/** The tour was taken, or is not wanted: it is not offered again. */
function rememberTour() {
  document.documentElement.dataset.tour = "known";
  try {
    localStorage.setItem("fovea-tour", "known");
  } catch {
    // then it is offered again at the next visit
  }
}

/** The stand-in's file. */
export function standIn() {
  return sample(STAND_IN);
}

async function follow() {
  const { hash } = location;
  if (!hash.startsWith(PREFIX)) return;
  const first = loaded === null;
  loaded ??= import("./article.js");
  const article = await loaded;
  if (first) await article.build(subject);
  byId("learn").hidden = false;
  const target = document.getElementById(hash.slice(1)) ?? byId("learn");
  target.scrollIntoView();
  (target.querySelector("h2, h3") ?? target).focus({ preventScroll: true });
}
