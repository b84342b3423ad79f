// What llama.cpp makes of a GGUF file, through node-llama-cpp's prebuilt library: ids, logits and speed, as JSON.
// Standard input: {folder, model, threads, rows: [[id]], texts: [text], generated}; folder holds node_modules.
import {readFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const asked = JSON.parse(readFileSync(0, "utf8"));
const entry = join(asked.folder, "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama} = await import(pathToFileURL(entry).href);
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error"});
const model = await llama.loadModel({modelPath: asked.model, gpuLayers: 0});
const context = await model.createContext({contextSize: 512, threads: asked.threads, flashAttention: false});
const sequence = context.getSequence();
const found = {ids: asked.texts.map((text) => model.tokenize(text, false)), logits: [], seconds: 0, tokens: 0};
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
if (asked.generated > 0) {
    await sequence.clearHistory();
    const start = asked.rows[0];
    await sequence.evaluateWithoutGeneratingNewTokens(start.slice(0, -1));
    let next = start.at(-1);
    const begin = process.hrtime.bigint();
    for (; found.tokens < asked.generated; found.tokens++) {
        const [output] = await sequence.controlledEvaluate([[next, {generateNext: {token: true, options: {temperature: 0}}}]]);
        next = output.next.token ?? start[0];
    }
    found.seconds = Number(process.hrtime.bigint() - begin) / 1e9;
}
process.stdout.write(JSON.stringify(found), () => process.exit(0));
