// What a mark stands for, beside the pointer: any element with data-tip says it, also when it has the focus.

import { h } from "./dom.js";

export function tips() {
  const box = document.body.appendChild(h("div", { id: "tip", role: "tooltip", hidden: true }));
  const show = (event) => {
    const mark = event.target.closest?.("[data-tip]");
    box.hidden = !mark;
    if (!mark) return;
    box.textContent = mark.dataset.tip;
    const around = mark.getBoundingClientRect();
    const [x, y] = event.type === "pointerover" ? [event.clientX, event.clientY] : [around.left, around.bottom];
    const { width, height } = box.getBoundingClientRect();
    box.style.left = `${Math.max(Math.min(x + 12, innerWidth - width - 8), 4)}px`;
    box.style.top = `${y + 18 + height > innerHeight ? Math.max(y - height - 10, 4) : y + 18}px`;
  };
  addEventListener("pointerover", show);
  addEventListener("focusin", show);
  addEventListener("scroll", () => (box.hidden = true), { passive: true, capture: true });
  addEventListener("hashchange", () => (box.hidden = true));
}
