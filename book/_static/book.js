// What the theme leaves undone: boxes that scroll say so, labels say what is seen, printing opens all.
(() => {
  "use strict";
  const each = (where, what) => document.querySelectorAll(where).forEach(what);

  // Boxes that scroll sideways can be reached by keyboard and fade where there is more.
  const BOXES = "article table, article pre, article div.math, article mjx-container[display]";
  const look = (box) => {
    const more = box.scrollWidth - box.clientWidth;
    const scrolls = more > 2 && getComputedStyle(box).overflowX !== "visible";
    box.classList.toggle("scrolls-sideways", scrolls);
    box.classList.toggle("more-left", scrolls && box.scrollLeft > 4);
    box.classList.toggle("more-right", scrolls && box.scrollLeft < more - 4);
    if (scrolls) {
      box.tabIndex = 0;
      if (box.tagName !== "TABLE" && !box.hasAttribute("aria-label")) {
        box.setAttribute("role", "region");
        box.setAttribute("aria-label", "scrolls sideways");
      }
    } else if (box.getAttribute("aria-label") === "scrolls sideways") {
      box.removeAttribute("role"); box.removeAttribute("aria-label"); box.removeAttribute("tabindex");
    }
  };
  const watch = new ResizeObserver((all) => all.forEach((entry) => look(entry.target)));
  const boxes = () => each(BOXES, (box) => {
    if (box.dataset.watched) return look(box);
    box.dataset.watched = "yes";
    box.addEventListener("scroll", () => look(box), { passive: true });
    watch.observe(box);
  });

  // A button's name contains the words on it; a header without words is no header; lists hold items.
  const labels = () => {
    each("summary", (e) => {
      if (e.textContent.trim()) return e.removeAttribute("aria-label");  // its words say more
      const page = e.closest("li")?.querySelector("a");  // an arrow in the list of pages
      if (page) e.setAttribute("aria-label", `pages under ${page.textContent.trim()}`);
    });
    each("button[aria-label], a[aria-label], label[aria-label]", (e) => {
      const seen = (e.innerText || e.textContent).replace(/\s+/g, " ").trim();
      const name = e.getAttribute("aria-label");
      if (seen && !name.toLowerCase().includes(seen.toLowerCase())) e.setAttribute("aria-label", `${seen}: ${name}`);
    });
    each("article th", (e) => {
      if (e.innerText.trim()) return;
      const cell = document.createElement("td");
      cell.innerHTML = e.innerHTML; cell.className = e.className; e.replaceWith(cell);
    });
    each(".citation-list[role=list], [role=list]", (list) => {
      if ([...list.children].some((e) => e.getAttribute("role") !== "listitem" && e.tagName !== "LI"))
        [...list.children].forEach((e) => e.setAttribute("role", "listitem"));
    });
    each("[role=doc-biblioentry]", (e) => {
      if (e.parentElement && e.parentElement.getAttribute("role") !== "list") e.parentElement.setAttribute("role", "list");
      e.setAttribute("role", "listitem");
    });
  };

  // On paper nothing is folded: solutions and the code of figures are open while printing.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((e) => { e.open = true; });
    each(".toggle-hidden", (e) => { e.classList.remove("toggle-hidden"); e.dataset.folded = "yes"; });
  });
  addEventListener("afterprint", () => {
    opened.forEach((e) => { e.open = false; });
    each("[data-folded]", (e) => { e.classList.add("toggle-hidden"); delete e.dataset.folded; });
  });

  const ready = () => {
    boxes(); labels();
    const math = window.MathJax && window.MathJax.startup && window.MathJax.startup.promise;
    if (math) math.then(boxes);
    setTimeout(() => { boxes(); labels(); }, 600);  // after the theme's own scripts
  };
  addEventListener("load", ready);
  addEventListener("resize", boxes);
  document.addEventListener("toggle", boxes, true);  // what was folded has no width until it is shown
  if (document.fonts) document.fonts.ready.then(boxes);
})();
