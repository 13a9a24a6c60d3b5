// Installed in JupyterLab's page by slider.py. One measurement each: `window.bench.x()` arms it and returns a promise of
// the milliseconds from the next input event.
() => {
    const painted = () => new Promise(done => requestAnimationFrame(() => {
        const channel = new MessageChannel();
        channel.port1.onmessage = () => done(performance.now());
        channel.port2.postMessage(0);
    }));
    const started = () => new Promise(done => {
        const hear = event => {
            for (const kind of ['keydown', 'click']) removeEventListener(kind, hear, true);
            done(Math.min(event.timeStamp, performance.now()));
        };
        for (const kind of ['keydown', 'click']) addEventListener(kind, hear, true);
    });
    const until = (node, test, options) => new Promise(done => {
        const observer = new MutationObserver(() => {
            if (!test()) return;
            observer.disconnect();
            done(performance.now());
        });
        observer.observe(node, options);
    });
    const text = { childList: true, characterData: true, subtree: true };
    const views = () => [...document.querySelectorAll('.sqviz.sm')];
    const since = async wait => {
        const start = await started();
        return await wait() - start;
    };
    window.bench = {
        // The view shows the new α with a source that fits: at first "read off the curve", then the kernel's.
        shown: (place, pattern) => {
            const node = document.querySelectorAll('.sm-reading')[place];
            const alpha = () => node.querySelector('.sm-big').textContent, old = alpha();
            const source = node.querySelector('.sm-source'), wanted = new RegExp(pattern);
            const fits = () => alpha() !== old && wanted.test(source.textContent);
            return since(() => until(node, fits, text));
        },
        echo: () => {
            const node = document.querySelector('.bench-label'), old = node.textContent;
            return since(() => until(node, () => node.textContent !== old, text));
        },
        opened: place => {
            const canvas = views()[place].querySelector('.sm-channels .sqviz-canvas canvas');
            const linear = () => canvas.dataset.drawn.split(' ')[0], old = linear();
            return since(() => until(canvas, () => linear() !== old, { attributes: true }).then(painted));
        },
        plotly: () => {
            const plot = document.querySelector('.js-plotly-plot');
            return since(() => new Promise(done => plot.once('plotly_afterplot', done)).then(painted));
        },
    };
}
