"""The style sheet of the report: one constant, light and dark, no outside resource."""

__all__ = ["STYLE"]

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f5;--sheet:#fff;--ink:#1b2420;--soft:#5d6b64;--line:#dfe5e1;--ours:#0f7b5f;
--other:#a9b8b1;--d0:#c2571a;--d1:#b8860b;--d2:#2563a8;--w0:#fbeee4;--w1:#faf3dc;--w2:#e6f0fb;--mark:#e5f4ee}
@media(prefers-color-scheme:dark){:root{--page:#111614;--sheet:#19201d;--ink:#e6ece9;--soft:#97a69f;--line:#2c3732;
--ours:#3cc79e;--other:#52615a;--d0:#f0935a;--d1:#e2b93b;--d2:#6aa9f0;--w0:#2c211a;--w1:#2a2617;--w2:#18242f;--mark:#16302a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:2rem;line-height:1.2;margin:0 0 .4rem;letter-spacing:-.02em}
h2{font-size:1.35rem;margin:2.6rem 0 .3rem;letter-spacing:-.01em}h3{font-size:1rem;margin:1.6rem 0 .4rem}
p{margin:.35rem 0;max-width:76ch}.soft,figcaption{color:var(--soft);font-size:.9rem}
.lead{font-size:1.12rem;border-left:4px solid var(--ours);padding:.3rem 0 .3rem 1rem;margin:1.1rem 0}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin:1.4rem 0}
.fact{background:var(--sheet);border:1px solid var(--line);border-radius:14px;padding:14px 16px}
.fact b{display:block;font-size:1.5rem;line-height:1.25;letter-spacing:-.02em}
.fact span{color:var(--soft);font-size:.86rem}
figure{background:var(--sheet);border:1px solid var(--line);border-radius:16px;padding:18px 18px 10px;margin:1rem 0;
overflow-x:auto}
figure svg{min-width:640px}
figcaption{padding:.5rem 0 .2rem}svg{display:block;width:100%;height:auto;font-family:inherit}
.table{background:var(--sheet);border:1px solid var(--line);border-radius:16px;overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:10px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th{font-weight:600;color:var(--soft);font-size:.82rem;white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:210px}
tr:last-child td{border-bottom:0}tr.ecotone td{background:var(--mark)}
td small{display:block;color:var(--soft);line-height:1.35}
td b{color:var(--ours)}details{margin:.6rem 0}summary{cursor:pointer;color:var(--soft)}code{font-size:.88em}
svg text{fill:var(--ink);font-size:13px}svg .name{font-weight:650;font-size:16px}
svg .small{fill:var(--soft);font-size:12.5px}
svg .tiny{fill:var(--soft);font-size:11.5px}svg .work{font-weight:600;font-size:13.5px}svg .value{font-weight:600}
svg .inbar{fill:var(--sheet);font-weight:600;font-size:12.5px}
.card{stroke-width:2}.card.d0{fill:var(--w0);stroke:var(--d0)}.card.d1{fill:var(--w1);stroke:var(--d1)}
.card.d2{fill:var(--w2);stroke:var(--d2)}.card.idle{fill:none;stroke:var(--line);stroke-dasharray:5 5}
.bar.d0{fill:var(--d0)}.bar.d1{fill:var(--d1)}.bar.d2{fill:var(--d2)}.cut{stroke:var(--ink);stroke-width:2}
.link{stroke:var(--ink);stroke-width:2;fill:none}.link.unused{stroke:var(--line)}
.link.back{stroke-dasharray:4 4;stroke:var(--soft)}
.tip{fill:var(--soft)}.ours{fill:var(--ours)}.other{fill:var(--other)}
.whisker{stroke:var(--soft);stroke-width:2;fill:none}
.said{fill:var(--sheet);stroke:var(--ink);stroke-width:1.6}
.grid{stroke:var(--line);stroke-width:1}.line{fill:none;stroke-width:2.4;stroke-linejoin:round}
.line.c0{stroke:var(--d1)}.line.c1{stroke:var(--d2)}.line.c2{stroke:var(--ours)}.line.c3{stroke:var(--d0)}
.dot.c0{fill:var(--d1)}.dot.c1{fill:var(--d2)}.dot.c2{fill:var(--ours)}.dot.c3{fill:var(--d0)}
.faint{opacity:.32}.line.faint{stroke-dasharray:5 4}.dot.best{stroke:var(--ink);stroke-width:2}
@media print{body{background:#fff}figure,.table,.fact{break-inside:avoid}}
"""
