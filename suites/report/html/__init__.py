"""Pages as single HTML files: they ask no network, and are for light, dark, phone and print.

    pages           render(): a template with its style and scripts in it

Templates extend `base.html`, which has the head and the switch of themes; `macros.html` has what
they share, as a command with its copy button. `style.css` has the look of every page, and `page.js`
what every page does. Templates and scripts of another package are named from suites/, as
`site/index.html`.
"""
