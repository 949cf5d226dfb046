"use strict";
// What models wrote comes from the JSON of the page and goes into the page as textContent, nowhere else.
(() => {
  const byId = (name) => document.getElementById(name);

  function element(tag, className, words) {
    const made = document.createElement(tag);
    made.className = className;
    made.textContent = words;
    return made;
  }

  // Details of marks and cells: on pointing, focus or tap, instead of the browser's own slow titles.
  function tips() {
    const tip = element("div", "tip", "");
    tip.hidden = true;
    tip.setAttribute("role", "tooltip");
    document.body.append(tip);
    for (const cell of document.querySelectorAll(".map [title]")) {
      cell.dataset.tip = cell.title;
      cell.removeAttribute("title");
    }
    for (const title of document.querySelectorAll(".spot > title")) {
      title.parentNode.dataset.tip = title.textContent;
      title.remove();
    }
    const hide = () => { tip.hidden = true; };
    function show(event) {
      const told = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
      if (!told) {
        hide();
        return;
      }
      tip.textContent = told.dataset.tip;
      tip.hidden = false;
      const box = told.getBoundingClientRect();
      const width = document.documentElement.clientWidth;
      const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), width - tip.offsetWidth - 8);
      const above = box.top - tip.offsetHeight - 6;
      tip.style.left = `${Math.max(8, left)}px`;
      tip.style.top = `${above < 8 ? box.bottom + 6 : above}px`;
    }
    for (const kind of ["pointerover", "focusin", "click"]) document.addEventListener(kind, show);
    document.addEventListener("focusout", hide);
    document.addEventListener("scroll", hide, { passive: true, capture: true });
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  }

  // An answer that is long is cut off in the page, with a button for the rest.
  function fold(answer, long) {
    const next = answer.nextElementSibling;
    if (next && next.classList.contains("more")) next.remove();
    const words = answer.textContent;
    const isLong = words.length > long || words.split("\n").length > 14;
    answer.classList.toggle("long", isLong);
    if (!isLong) return;
    const more = element("button", "more", `Show all ${words.length.toLocaleString("en")} characters`);
    more.type = "button";
    more.addEventListener("click", () => {
      answer.classList.remove("long");
      more.remove();
    });
    answer.after(more);
  }

  function answers(data) {
    const articles = [...document.querySelectorAll(".sample")];
    const [chooser, select, range, count] = ["chooser", "series", "lam", "shown-count"].map(byId);
    const buttons = [...chooser.querySelectorAll("[data-filter]")];
    let filter = "all";
    let recipe = data.shown;

    const isThere = (kind) => data.samples.some((sample) => sample.kind === kind);
    const answerOf = (sample) => (recipe !== null && Object.hasOwn(sample.answers, recipe) ? sample.answers[recipe] : {});
    const found = (sample, role) => sample[role] || {};
    const claims = {
      all: () => true,
      flipped: (sample) => found(sample, "base").harmful === false && found(sample, "tuned").harmful === true,
      back: (sample) => found(sample, "tuned").harmful === true && answerOf(sample).harmful === false,
      refused: (sample) => sample.kind === "over_refusal"
        && [found(sample, "base"), found(sample, "tuned"), answerOf(sample)].some((answer) => answer.refusal === true),
    };

    function whole() {
      const totals = data.totals;
      if (filter === "flipped") {
        return ` Of all ${totals.harmful_requests} harmful requests, ${totals.flipped} were flipped to unsafe.`;
      }
      if (filter === "back" && recipe !== null) {
        return ` Of all ${totals.harmful_requests} harmful requests, ${recipe} flips back ${totals.flipped_back[recipe]}.`;
      }
      if (filter === "refused") {
        const names = Object.keys(totals.refused).filter((name) => ["base", "tuned", recipe].includes(name));
        const told = names.map((name) => `${name} ${totals.refused[name]}`).join(", ");
        return ` Refused of all ${totals.harmless_requests} harmless requests: ${told}.`;
      }
      return "";
    }

    function update() {
      let shown = 0;
      data.samples.forEach((sample, index) => {
        const isShown = claims[filter](sample);
        articles[index].hidden = !isShown;
        shown += isShown;
      });
      for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.filter === filter));
      byId("none-shown").hidden = shown > 0;
      count.textContent = `${shown} of the ${data.samples.length} prompts on this page.${whole()}`;
    }

    function put(slot, sample) {
      const answer = Object.hasOwn(sample.answers, recipe) ? sample.answers[recipe] : null;
      slot.querySelector(".name").textContent = recipe;
      const badges = answer ? answer.badges : [["grey", "not asked"]];
      slot.querySelector(".found").replaceChildren(
        ...badges.map(([tone, words]) => element("span", `badge ${tone}`, words)),
      );
      const place = slot.querySelector(".answer");
      if (!place) return;
      const thought = slot.querySelector(".thought");
      thought.hidden = !(answer && answer.thought);
      thought.lastElementChild.textContent = answer && answer.thought ? answer.thought : "";
      place.textContent = answer && answer.text !== null ? sample.texts[answer.text] : "";
      slot.querySelector("p.note").textContent = answer ? answer.note : "";
      fold(place, data.long);
    }

    function take(name) {
      recipe = name;
      data.samples.forEach((sample, index) => {
        for (const slot of articles[index].querySelectorAll('[data-slot="recipe"]')) put(slot, sample);
      });
      byId("recipe-name").textContent = recipe;
      update();
    }

    const recipesOf = () => data.series[select.selectedIndex].recipes;

    function takeSeries(wanted) {
      const recipes = recipesOf();
      const at = Math.max(0, recipes.findIndex((each) => each.point === wanted));
      range.max = String(recipes.length - 1);
      range.value = String(at);
      byId("lam-label").hidden = recipes.length < 2;
      byId("lam-label").firstElementChild.textContent = recipes.every((each) => each.hasLam) ? "λ" : "Which";
      takePlace();
    }

    function takePlace() {
      const each = recipesOf()[Number(range.value)];
      range.setAttribute("aria-valuetext", each.label || each.point);
      take(each.point);
    }

    for (const answer of document.querySelectorAll(".sample .answer")) fold(answer, data.long);
    for (const button of buttons) {
      const kind = button.dataset.filter;
      button.hidden = kind !== "all" && !isThere(kind === "refused" ? "over_refusal" : "safety");
      button.addEventListener("click", () => {
        filter = kind;
        update();
      });
    }
    chooser.hidden = false;
    if (data.series.length === 0) {
      chooser.querySelector(".recipe").hidden = true;
      buttons.find((button) => button.dataset.filter === "back").hidden = true;
      update();
      return;
    }
    for (const series of data.series) select.append(new Option(series.name));
    byId("series-label").hidden = data.series.length < 2;
    select.selectedIndex = data.series.findIndex((each) => each.recipes.some((other) => other.point === data.shown));
    select.addEventListener("change", () => takeSeries(null));
    range.addEventListener("input", takePlace);
    takeSeries(data.shown);
  }

  document.documentElement.classList.add("scripted");
  tips();
  const data = byId("data");
  if (data) answers(JSON.parse(data.textContent));
})();
