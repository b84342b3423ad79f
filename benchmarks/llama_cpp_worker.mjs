// What llama.cpp makes of a GGUF file, through node-llama-cpp's prebuilt library: ids, logits, texts and speed, as JSON.
// Standard input: {folder, model, threads, rows: [[id]], texts: [text], generated, prompts: [text], max_new, suppressed: [id], cache};
// folder holds node_modules. `generated` ids are drawn for speed; `prompts` are continued greedily, up to an end of text.
// `cache` is the type of keys and values, F16 by default.
import {readFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const asked = JSON.parse(readFileSync(0, "utf8"));
const loading = process.hrtime.bigint();
const entry = join(asked.folder, "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama} = await import(pathToFileURL(entry).href);
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error"});
const model = await llama.loadModel({modelPath: asked.model, gpuLayers: 0});
const kept = asked.cache ? {experimentalKvCacheKeyType: asked.cache, experimentalKvCacheValueType: asked.cache} : {};
const context = await model.createContext({contextSize: 512, threads: asked.threads, flashAttention: false, ...kept});
const sequence = context.getSequence();
const load_s = Number(process.hrtime.bigint() - loading) / 1e9;
const found = {load_s, texts: [], generate_s: 0, ids: asked.texts.map((text) => model.tokenize(text, false)), logits: [], seconds: 0, cpu_seconds: 0, tokens: 0};
for (const row of asked.rows) {
    await sequence.clearHistory();
    const items = row.map((token) => [token, {generateNext: {logits: true}}]);
    const outputs = await sequence.controlledEvaluate(items);
    found.logits.push(outputs.map((output) => {
        const dense = new Array(output.next.logits.size).fill(0);
        for (const [token, value] of output.next.logits) dense[token] = value;
        return dense;
    }));
}
const bias = new Map((asked.suppressed ?? []).map((token) => [token, "never"]));
for (const prompt of asked.prompts ?? []) {
    await sequence.clearHistory();
    const ids = [model.tokens.bos, ...model.tokenize(prompt, false)];
    const begin = process.hrtime.bigint();
    await sequence.evaluateWithoutGeneratingNewTokens(ids.slice(0, -1));
    const written = [];
    for (let last = ids.at(-1); written.length < asked.max_new;) {
        const options = {temperature: 0, ...(bias.size ? {tokenBias: () => bias} : {})};
        const [output] = await sequence.controlledEvaluate([[last, {generateNext: {token: true, options}}]]);
        last = output.next.token;
        if (last === undefined || model.isEogToken(last)) break;
        written.push(last);
    }
    found.generate_s += Number(process.hrtime.bigint() - begin) / 1e9;
    found.tokens += written.length;
    found.ids.push(written);
    found.texts.push(model.detokenize(written, false, ids));
}
if (asked.generated > 0) {
    await sequence.clearHistory();
    const start = asked.rows[0];
    await sequence.evaluateWithoutGeneratingNewTokens(start.slice(0, -1));
    let next = start.at(-1);
    const begin = process.hrtime.bigint();
    const busy = process.cpuUsage();
    for (; found.tokens < asked.generated; found.tokens++) {
        const [output] = await sequence.controlledEvaluate([[next, {generateNext: {token: true, options: {temperature: 0}}}]]);
        next = output.next.token ?? start[0];
    }
    found.seconds = Number(process.hrtime.bigint() - begin) / 1e9;
    const used = process.cpuUsage(busy);
    found.cpu_seconds = (used.user + used.system) / 1e6;
}
process.stdout.write(JSON.stringify(found), () => process.exit(0));
