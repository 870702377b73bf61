"use strict";
// Without access to `eval`: expressions are interpreted. Actions would offer to leave the page.
const options = {
  actions: false,
  ast: true,
  defaultStyle: false,
  renderer: "svg",
  tooltip: { disableDefaultStyle: true, theme: "report" },
};
const charts = JSON.parse(document.getElementById("charts").textContent);
for (const [name, chart] of Object.entries(charts)) {
  const place = document.getElementById(`chart-${name}`);
  window.vegaEmbed(place, chart, options).then(
    () => place.classList.add("drawn"),
    (error) => {
      place.textContent = "This chart could not be drawn.";
      console.error(error);
    },
  );
}
