// Installed in JupyterLab's page by attention_browser.py, as `window.attention`: each call returns a promise.
() => {
    const LIMIT = 120_000;
    const painted = () => new Promise(done => requestAnimationFrame(() => {
        const channel = new MessageChannel();
        channel.port1.onmessage = () => done(performance.now());
        channel.port2.postMessage(0);
    }));
    const within = (promise, what) => Promise.race([
        promise, new Promise((_, fail) => setTimeout(() => fail(new Error(`${what}: nothing came`)), LIMIT)),
    ]);
    const heard = kind => new Promise(done => addEventListener(kind, event => done(event.timeStamp), { capture: true, once: true }));
    const until = (node, test) => new Promise(done => {
        const look = () => {
            if (!test()) return;
            observer.disconnect();
            done();
        };
        const observer = new MutationObserver(look);
        observer.observe(node, { attributes: true, childList: true, characterData: true, subtree: true });
        look();
    });
    const overviews = () => [...document.querySelectorAll('.sqviz canvas')].filter(canvas => canvas.panels);
    const current = () => overviews().find(canvas => canvas.offsetParent); // the one cell that is not hidden
    const view = () => current().closest('.sqviz');
    const newOne = async old => {
        while (!overviews().some(canvas => !old.has(canvas) && canvas.paints > 0)) await new Promise(requestAnimationFrame);
    };
    window.attention = {
        // Run a cell that shows a view. Seconds from the command to the painted heads, and when that was (Unix time).
        run: cell => {
            const notebook = window.jupyterapp.shell.currentWidget.content, old = new Set(overviews());
            notebook.activeCellIndex = cell;
            notebook.deselectAll();
            const start = performance.now();
            const ran = window.jupyterapp.commands.execute('notebook:run-cell');
            const seen = newOne(old).then(painted);
            return within(seen.then(end => ran.then(() => [(end - start) / 1000, (performance.timeOrigin + end) / 1000])), 'the view');
        },
        // Milliseconds from the next move of the mouse to a tooltip that says something else.
        tip: () => {
            const box = view().querySelector('.sqviz-tip'), old = box.hidden ? null : box.textContent;
            const start = heard('pointermove');
            const shown = start.then(() => until(box, () => !box.hidden && box.textContent !== old)).then(painted);
            return within(shown.then(async end => end - await start), 'the tooltip');
        },
        // Milliseconds from the next click to the head shown large, and to the same token by token.
        head: () => {
            const root = view(), overview = current();
            const open = () => Boolean(overview.closest('[hidden]'));
            const computing = () => [...root.querySelectorAll('.sqviz-note')].some(note => note.textContent.includes('computing it'));
            const follow = async () => {
                const start = await heard('click');
                await until(root, open);
                const large = await painted();
                await until(root, () => open() && !computing());
                return [large - start, await painted() - start];
            };
            return within(follow(), 'the head');
        },
        // Bring the heads into view.
        show: () => current().scrollIntoView({ block: 'start' }),
        // [x, y, side] of the heads in view, in client coordinates.
        places: () => {
            const canvas = current(), frame = canvas.getBoundingClientRect(), { side, tiles } = canvas.panels();
            return tiles.map(({ x, y }) => [frame.x + x, frame.y + y, side])
                .filter(([x, y]) => x > 0 && y > 0 && x + side < innerWidth && y + side < innerHeight - 40);
        },
    };
}
