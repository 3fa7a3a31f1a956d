// llama.cpp on one thread, in a process of its own, for `blyan-node bench`.
//
// usage: node llama_peer.mjs PATH-OF-node-llama-cpp MODEL.gguf CONTEXT
//
// Prints "ready", then for each line of input "PROMPT_TOKENS NEW_TOKENS" one line of JSON:
// {"prefill": tokens/s, "decode": tokens/s, "tokens": [...]}. The prompt is 3, 4, 5, ...

import path from "node:path";
import readline from "node:readline";
import {pathToFileURL} from "node:url";

const [folder, modelPath, contextSize] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(path.join(folder, "dist", "index.js")));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1, logLevel: "error"});
const model = await llama.loadModel({modelPath, gpuLayers: 0});
const size = Number(contextSize);
const context = await model.createContext({contextSize: size, batchSize: size, threads: 1});
const sequence = context.getSequence();

// The prompt but its last token, then greedy tokens, each made from the one before it.
async function run(prompt, count) {
    await sequence.clearHistory();
    const ids = Array.from({length: prompt}, (_, index) => 3 + index);
    const began = performance.now();
    const tokens = [];
    let first = 0;
    for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        if (tokens.length === 0)
            first = performance.now();
        tokens.push(token);
        if (tokens.length === count)
            break;
    }
    const decoding = (performance.now() - first) / 1000;
    const decode = count > 1 ? (count - 1) / decoding : 0;
    return {prefill: prompt / ((first - began) / 1000), decode, tokens};
}

console.log("ready");
for await (const line of readline.createInterface({input: process.stdin})) {
    const [prompt, count] = line.split(" ").map(Number);
    console.log(JSON.stringify(await run(prompt, count)));
}
process.exit(0);
