// Keeps a page fresh: each event of the node makes it fetch itself again and
// swap its live part. Without JavaScript the page is complete, only still.
"use strict";
(() => {
  const clock = () => document.querySelectorAll("footer time").forEach((t) => { t.textContent = new Date(t.dateTime).toLocaleString(); });
  clock();
  if (!document.querySelector("[data-live]") || !window.EventSource) return;
  let busy = false, again = false;
  const refresh = async () => {
    if (busy) { again = true; return; }
    busy = true;
    try {
      const r = await fetch(location.href, { headers: { Accept: "text/html" } });
      if (r.redirected) { location.href = r.url; return; }
      const next = new DOMParser().parseFromString(await r.text(), "text/html");
      for (const sel of ["main", "footer"]) {
        const a = document.querySelector(sel), b = next.querySelector(sel);
        if (a && b && !a.contains(document.activeElement)) a.replaceWith(b);
      }
      clock();
    } catch { document.querySelector(".sentence")?.classList.add("bad"); }
    busy = false;
    if (again) { again = false; setTimeout(refresh, 500); }
  };
  new EventSource("/api/v1/events").addEventListener("status", refresh);
})();
