"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const button = (text, title, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.title = title;
    made.addEventListener("click", act);
    return made;
  };

  // Light, dark, or as the system says.
  const theme = document.getElementById("theme");
  const order = ["auto", "light", "dark"];
  const apply = (name) => {
    if (name === "auto") delete root.dataset.theme;
    else root.dataset.theme = name;
    theme.textContent = "theme: " + name;
    theme.dataset.name = name;
  };
  let kept = null;
  try { kept = localStorage.getItem("secateur-theme"); } catch { /* a browser may keep nothing for files */ }
  apply(order.includes(kept) ? kept : "auto");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const next = order[(order.indexOf(theme.dataset.name) + 1) % order.length];
    apply(next);
    try { localStorage.setItem("secateur-theme", next); } catch { /* see above */ }
  });

  const save = (name, blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  // A spreadsheet would run a text that looks like a formula.
  const field = (value) => {
    if (value === null || value === undefined) return "";
    let text = String(value);
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = "'" + text;
    return /[",\n\r]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  };
  const csv = (key) => {
    const table = data.tables[key];
    return [table.columns, ...table.rows].map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
  };

  // The drawing with the colours of the moment written into it, since it leaves the style sheet behind.
  const LOOK = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "paint-order",
    "font-family", "font-size", "font-weight", "text-anchor"];
  const standalone = (svg) => {
    const copy = svg.cloneNode(true);
    const from = [svg, ...svg.querySelectorAll("*")];
    const to = [copy, ...copy.querySelectorAll("*")];
    from.forEach((element, i) => {
      const look = getComputedStyle(element);
      for (const name of LOOK) to[i].setAttribute(name, look.getPropertyValue(name));
      to[i].removeAttribute("class");
      to[i].removeAttribute("data-tip");
    });
    const box = svg.viewBox.baseVal;
    copy.setAttribute("width", box.width);
    copy.setAttribute("height", box.height);
    const paper = document.createElementNS(svg.namespaceURI, "rect");
    paper.setAttribute("width", "100%");
    paper.setAttribute("height", "100%");
    paper.setAttribute("fill", getComputedStyle(document.body).backgroundColor);
    copy.prepend(paper);
    return { text: new XMLSerializer().serializeToString(copy), width: box.width, height: box.height };
  };
  const picture = (svg) => new Promise((done, failed) => {
    const drawn = standalone(svg);
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      canvas.width = 2 * drawn.width;
      canvas.height = 2 * drawn.height;
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => (blob ? done(blob) : failed(new Error("no picture"))), "image/png");
    };
    image.onerror = () => failed(new Error("the drawing cannot be shown"));
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(drawn.text);
  });

  for (const tools of document.querySelectorAll(".tools")) {
    const { rows, drawing, copy } = tools.dataset;
    if (drawing) {
      const svg = document.getElementById(drawing).querySelector("svg");
      tools.append(
        button("SVG", "save the figure as SVG", () =>
          save(drawing + ".svg", new Blob([standalone(svg).text], { type: "image/svg+xml" }))),
        button("PNG", "save the figure as PNG", () => picture(svg).then((blob) => save(drawing + ".png", blob))));
    }
    if (rows) {
      tools.append(button("CSV", "save the data as CSV", () =>
        save(rows + ".csv", new Blob([csv(rows)], { type: "text/csv;charset=utf-8" }))));
    }
    if (copy) {
      tools.append(button("copy", "copy the command", (event) => {
        const node = document.getElementById(copy);
        const range = document.createRange();
        range.selectNodeContents(node);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        // Pages from files may not have the clipboard; the selection is there for the keyboard.
        if (navigator.clipboard) navigator.clipboard.writeText(node.textContent).then(() => { event.target.textContent = "copied"; }, () => {});
      }));
    }
  }

  // Tables are sorted by the raw values; rows without one come last either way.
  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const text = head.textContent;
      head.textContent = "";
      head.append(button(text, "sort by this column", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (row) => {
          const cell = row.cells[column];
          if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
          return cell.textContent === "-" ? null : cell.textContent;
        };
        const compare = (a, b) => {
          if (a === null || b === null) return (a === null) - (b === null);
          const apart = typeof a === "number" && typeof b === "number" ? a - b
            : String(a).localeCompare(String(b), undefined, { numeric: true });
          return up ? apart : -apart;
        };
        const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
        rows.sort((a, b) => compare(a[0], b[0]));
        table.tBodies[0].append(...rows.map((pair) => pair[1]));
      }));
    });
  }

  // What a mark stands for, under the pointer or the finger.
  const tip = document.getElementById("tip");
  const show = (event) => {
    const text = event.target.dataset && event.target.dataset.tip;
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const y = event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : event.clientY + 18;
    tip.style.left = Math.max(8, x) + "px";
    tip.style.top = Math.max(8, y) + "px";
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });
})();
