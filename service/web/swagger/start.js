// Shows the document of this service. Its address is relative to this script's: that has the prefix that a proxy may
// have put in front of ours, and the version of these files.
"use strict";

(async () => {
  const root = document.currentScript.src.replace(/docs\/swagger\/(v-\w+\/)?start\.js$/, "");
  const url = `${root}openapi.json`;
  const TWINS = "the same for one version, or by PUT";

  const reply = await fetch(url);
  const spec = await reply.json();
  // Here and not in the document: programs that make clients from it name their modules by tags.
  fold(spec);
  for (const server of spec.servers) server.url = new URL(server.url, url).href;
  const ui = SwaggerUIBundle({
    spec,
    dom_id: "#api",
    deepLinking: true,
    validatorUrl: null,
    onComplete() {
      if (!decodeURIComponent(location.hash).includes(TWINS))
        ui.layoutActions.show(["operations-tag", TWINS], false);
    },
  });

  /** Put calls that only repeat others into a group of their own. */
  function fold({ paths, tags }) {
    const known = new Set(Object.keys(paths));
    for (const [path, operations] of Object.entries(paths)) {
      const [plain, rest] = path.split(/\/versions\/\{version\}|\/\{version\}/);
      const isVersion = rest !== undefined && known.has(plain + rest);
      for (const [method, operation] of Object.entries(operations))
        if (isVersion || (method === "put" && "post" in operations)) operation.tags = [TWINS];
    }
    tags.push({ name: TWINS, description: "Calls of the groups above, with a version in the path or the other method." });
  }
})();
