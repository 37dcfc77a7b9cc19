/* Runs lowered networks from C and C++, without Python and without torch: a folder that Lowered.save (or Result.save:
 * its subfolder "program") wrote, on the CPU engine or on a GPU.
 *
 *   prunekern_network* net = prunekern_open("small/program", "cpu", 1, 1);
 *   if (!net) { fprintf(stderr, "%s\n", prunekern_error()); exit(1); }
 *   const void* inputs[] = {image};      void* outputs[] = {scores};
 *   if (prunekern_run(net, inputs, outputs, NULL)) ...
 *   prunekern_close(net);
 *
 * Functions that fail give NULL, or a number that is not 0 (a negative one where a count is asked for); prunekern_error
 * then says why, for the calling thread. A Program with steps that need torch (ATen operators, recurrent layers) is
 * refused by the steps' names. */
#ifndef PRUNEKERN_H
#define PRUNEKERN_H

#include <stdint.h>

#if defined(__GNUC__)
#define PRUNEKERN_API __attribute__((visibility("default")))
#else
#define PRUNEKERN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct prunekern_network prunekern_network;
typedef struct prunekern_weights prunekern_weights;

/* folder: with program.json and its weights. device: "cpu", "cuda" or "cuda:N". batch: samples of every call; the
 * Program may hold for one batch size only. threads: of the CPU engine. */
PRUNEKERN_API prunekern_network* prunekern_open(const char* folder, const char* device, int64_t batch, int threads);
PRUNEKERN_API void prunekern_close(prunekern_network* network);

/* inputs, outputs: one address for each tensor of the call and of its result, dense, in torch's order of axes; memory of
 * the CPU, or of the GPU, aligned to 16 bytes there. stream: a cudaStream_t, or NULL for the default one; the call
 * returns before the GPU is done. On the CPU any number of threads may run a network at a time; on a GPU calls of one
 * network follow each other. */
PRUNEKERN_API int prunekern_run(prunekern_network* network, const void* const* inputs, void* const* outputs, void* stream);
/* The same with memory of the CPU, whatever the device is; returns when the outputs are there. */
PRUNEKERN_API int prunekern_run_host(prunekern_network* network, const void* const* inputs, void* const* outputs);

PRUNEKERN_API int prunekern_input_count(const prunekern_network* network);
PRUNEKERN_API int prunekern_output_count(const prunekern_network* network);
/* output: 0 asks about an input. Gives the number of axes, and fills in as many sizes as there is room for. */
PRUNEKERN_API int prunekern_shape(const prunekern_network* network, int output, int index, int64_t* shape, int room);
/* "float32", "int64", ...: torch's names. */
PRUNEKERN_API const char* prunekern_dtype(const prunekern_network* network, int output, int index);
PRUNEKERN_API const char* prunekern_error(void);

/* ---- what the Python backend uses --------------------------------------------------------------------------------
 * Why a device cannot be used here ("" where it can). */
PRUNEKERN_API const char* prunekern_unavailable(const char* device);
/* Weights by name, in the caller's memory for as long as they are used; packed copies are made once on the device. */
PRUNEKERN_API prunekern_weights* prunekern_make_weights(const char* device, int count, const char* const* names,
                                                        const char* const* dtypes, const int* ranks,
                                                        const int64_t* shapes, const void* const* data);
PRUNEKERN_API void prunekern_free_weights(prunekern_weights* weights);
/* program: the JSON of core/storage.py's to_json; options: see csrc/api/network.cpp. A network with refused steps is
 * made all the same; it says so in its description and cannot run. */
PRUNEKERN_API prunekern_network* prunekern_build(const char* program, prunekern_weights* weights, const char* options);
/* JSON: refusals, algorithms, spans, places, arena, way. Lives as long as the network. */
PRUNEKERN_API const char* prunekern_describe(const prunekern_network* network);
/* Ops [begin, end) one by one. */
PRUNEKERN_API int prunekern_run_ops(prunekern_network* network, int64_t begin, int64_t end, const void* const* inputs,
                                    void* const* outputs, void* stream);

#ifdef __cplusplus
}
#endif

#endif
