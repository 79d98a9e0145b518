/** What a model can tell, in a sentence. */

import { whole } from "./numbers.js";

/** Labels up to which all are named. */
const ALL = 12;
/** Labels that are named where there are more. */
const SOME = 8;

/**
 * What a model can tell, from its contract.
 * @param {{task: string, labels: string[]}} contract
 */
export function describeKnowledge({ task, labels }) {
  const named = labels.slice(0, labels.length <= ALL ? ALL : SOME);
  const others = labels.length - named.length;
  const list = [...named, ...(others ? [`and ${whole(others)} others`] : [])].join(", ");
  return task === "multilabel"
    ? `It finds any of ${whole(labels.length)} things in a photo: ${list}.`
    : `It tells apart ${whole(labels.length)} things: ${list}.`;
}
