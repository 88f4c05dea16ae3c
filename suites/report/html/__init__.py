"""Pages as single HTML files: they ask no network, and are for light, dark, phone and print.

    pages            render(): a template with its style and scripts in it
    check_data       what scripts read of checks
    defect_data      what templates and scripts show of defects
    benchmark_data   what charts read of benchmarks
    run_page         report.html: a run
    comparison_page  two runs

Templates extend `base.html`, which has the head and the switch of themes; `macros.html` has what
they share, as a command with its copy button. `style.css` has the look of every page, and `page.js`
what every page does. Templates and scripts of another package are named from suites/, as
`website/index.html`. `vendor/` has the library for charts, Observable Plot, as its authors publish
it.
"""
