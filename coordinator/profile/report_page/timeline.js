// The timeline: three lanes, a window of time that can be moved, and one chosen round.
(() => {
  const WIDTH = 1140, LEFT = 96, LANE = 34, TOP = 8;
  const LANES = ["coordinator", "draft", "verify"];
  const rounds = record.rounds;
  const holder = document.getElementById("timeline");
  const details = document.getElementById("round-details");
  if (!rounds.length) return nothing("timeline", "No rounds.");
  const [begin, end] = [Math.min(0, span[0]), span[1]];
  // Opens on as many rounds as can be told apart.
  let from = begin, to = rounds.length > 60 ? rounds[59].at + rounds[59].seconds : end;
  let chosen = -1;

  function draw() {
    const height = TOP + LANES.length * LANE + 30;
    const svg = canvas("timeline", WIDTH, height, "Timeline of rounds");
    const x = (time) => LEFT + (WIDTH - LEFT) * (time - from) / (to - from);
    const clip = node("clipPath", { id: "window" });
    clip.append(node("rect", { x: LEFT, y: 0, width: WIDTH - LEFT, height }));
    const stripes = node("pattern", { id: "stripes", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
    stripes.append(node("line", { class: "hatch", x1: 0, x2: 0, y1: 0, y2: 6 }));
    svg.append(clip, stripes);
    const by = step(to - from, 10);
    for (let time = Math.ceil(from / by) * by; time <= to; time += by) {
      svg.append(node("line", { class: "gridline", x1: x(time), x2: x(time), y1: TOP, y2: height - 24 }));
      svg.append(node("text", { x: x(time), y: height - 8, "text-anchor": "middle" }, `${+(1000 * time).toFixed(3)} ms`));
    }
    LANES.forEach((name, lane) =>
      svg.append(node("text", { class: "strong", x: 0, y: TOP + lane * LANE + 19 }, name)));
    const body = node("g", { "clip-path": "url(#window)" });
    const box = (lane, at, seconds, fill, inset = 0) => node("rect", {
      class: fill, x: x(at), width: Math.max(0.7, x(at + seconds) - x(at) - 0.5),
      y: TOP + lane * LANE + 3 + inset, height: LANE - 10 - 2 * inset, rx: 1.5 });
    rounds.forEach((one, index) => {
      if (one.at > to || one.at + one.seconds < from) return;
      const whole = titled(box(0, one.at, one.seconds, "fill-round"), label(one));
      whole.setAttribute("data-round", index);
      if (index === chosen) whole.classList.add("chosen");
      body.append(whole);
      if (one.phases.accept) body.append(box(0, one.at + one.seconds - one.phases.accept, one.phases.accept, "fill-accept"));
      for (const [lane, side] of [[1, "draft"], [2, "verify"]]) {
        const exchange = one[side];
        if (!exchange) continue;
        const bar = titled(box(lane, exchange.served_at, exchange.service_seconds, `fill-${side}`), `${side}, ${label(one)}`);
        bar.setAttribute("data-round", index);
        if (index === chosen) bar.classList.add("chosen");
        body.append(bar);
        // Striped where the draft works, so that the lanes differ by more than hue.
        if (side === "draft") body.append(node("rect", { fill: "url(#stripes)", "pointer-events": "none", x: bar.getAttribute("x"), y: bar.getAttribute("y"), width: bar.getAttribute("width"), height: bar.getAttribute("height") }));
      }
    });
    svg.append(body);
    svg.addEventListener("click", (event) => {
      const index = event.target.getAttribute("data-round");
      if (index !== null) choose(+index);
    });
  }

  function label(one) {
    return `round ${one.round}, ${one.mode}: K ${one.k}, ${one.accepted} of ${one.proposed} accepted, ${milliseconds(one.seconds)}`;
  }

  function why(one) {
    if (!one.k_reason) return "";
    const rate = (tokens) => `${Math.round(tokens)} tokens/s`;
    return ` K as chosen: speculation ${one.k_reason}, ${rate(one.foreseen_rate)} foreseen, ${rate(one.foreseen_plain_rate)} without.`;
  }

  function choose(index) {
    chosen = Math.max(0, Math.min(rounds.length - 1, index));
    const one = rounds[chosen];
    if (one.at < from || one.at + one.seconds > to) move(one.at - (to - from) / 3, to - from);
    for (const old of document.querySelectorAll(".tok.chosen")) old.classList.remove("chosen");
    for (const token of document.querySelectorAll(`.tok[data-round="${chosen}"]`)) token.classList.add("chosen");
    const parts = PHASES.filter((name) => one.phases[name] > 0).map((name) => `${name} ${milliseconds(one.phases[name])}`);
    details.replaceChildren();
    const head = document.createElement("b");
    head.textContent = `Round ${one.round} (${one.mode})`;
    details.append(head, ` at ${milliseconds(one.at)}, ${milliseconds(one.seconds)}; K ${one.k}, ` +
      `${one.accepted} of ${one.proposed} accepted, ${one.emitted} emitted, ${one.rows} rows, batch of ${one.batch_size}. ` +
      parts.join(", ") + (one.hidden ? `, hidden ${milliseconds(one.hidden)}` : "") + (one.lost ? `; lost the ${one.lost} service` : "") + "." + why(one));
    draw();
  }

  function move(start, width) {
    width = Math.min(Math.max(width, 1e-4), end - begin);
    from = Math.min(Math.max(start, begin), end - width);
    to = from + width;
  }

  function zoom(times) {
    const middle = chosen >= 0 ? rounds[chosen].at + rounds[chosen].seconds / 2 : (from + to) / 2;
    const width = (to - from) * times;
    move(middle - width / 2, width);
    draw();
  }

  const actions = {
    earlier: () => { move(from - 0.6 * (to - from), to - from); draw(); },
    later: () => { move(from + 0.6 * (to - from), to - from); draw(); },
    in: () => zoom(0.5),
    out: () => zoom(2),
    all: () => { move(begin, end - begin); draw(); },
  };
  for (const button of document.querySelectorAll("[data-do]"))
    button.addEventListener("click", actions[button.dataset.do]);
  const keys = {
    ArrowLeft: () => choose(chosen - 1), ArrowRight: () => choose(chosen + 1),
    "+": actions.in, "=": actions.in, "-": actions.out, 0: actions.all,
    Home: () => choose(0), End: () => choose(rounds.length - 1),
  };
  holder.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
  document.getElementById("text").addEventListener("click", (event) => {
    const index = event.target.dataset.round;
    if (index !== undefined) choose(+index);
  });
  draw();
  details.textContent = "Choose a round: click it, click a token of the text, or use the keys.";
})();
