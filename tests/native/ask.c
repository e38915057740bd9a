/* Asks a SavedModel with a string-in, string-out signature, in TensorFlow's own C runtime.
 *
 * No Python is in this process: what the model answers here it also answers in a server such as
 * TensorFlow Serving, which runs the same graph with the same kernels.
 *
 *   ask --model DIR [--library OPS.so]... --input NAME [--max-length NAME VALUE]
 *       --text NAME --error NAME -- PROMPT...
 *
 * NAME is a tensor's name as in a SignatureDef, such as `generate_prompts:0`. The prompts are fed
 * as one string tensor of shape [N]; the text and the error are two string tensors of shape [N].
 * Written to standard output, for each prompt: the text, a NUL byte, the error, a NUL byte.
 *
 * Exits with 0; with 1 if TensorFlow or the model failed, saying how on standard error; with 2 if
 * it was called wrongly.
 */

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"
#include "tensorflow/c/tf_tensor.h"
#include "tensorflow/c/tf_tstring.h"

enum { SUCCEEDED = 0, FAILED = 1, CALLED_WRONGLY = 2 };
enum { PROMPTS = 0, MAX_LENGTH = 1, MAX_INPUTS = 2 };
enum { TEXT = 0, ERROR = 1, OUTPUTS = 2 };

static const char USAGE[] =
    "usage: ask --model DIR [--library OPS.so]... --input NAME [--max-length NAME VALUE]\n"
    "           --text NAME --error NAME -- PROMPT...\n"
    "NAME is a tensor's, with its output's number: generate_prompts:0\n";

/* The command line. Strings are borrowed from argv, only the list of libraries is owned. */
typedef struct {
  const char *model;
  const char **libraries;
  int library_count;
  const char *inputs[MAX_INPUTS]; /* the second is NULL without --max-length */
  int32_t max_length;
  const char *outputs[OUTPUTS];
  char **prompts;
  int prompt_count;
} Options;

/* All that TensorFlow gave and must get back; what was not reached yet is NULL. */
typedef struct {
  TF_Status *status;
  TF_Library **libraries;
  TF_Graph *graph;
  TF_SessionOptions *session_options;
  TF_Session *session;
  TF_Tensor *inputs[MAX_INPUTS];
  TF_Tensor *outputs[OUTPUTS];
} Runtime;

/* ------------------------------------------------------------------ the command line */

static int usage(const char *problem, const char *what) {
  fprintf(stderr, "ask: %s: %s\n%s", problem, what, USAGE);
  return CALLED_WRONGLY;
}

/* Reads all of `text` as a number from `low` to INT32_MAX. */
static bool parse_int32(const char *text, int32_t low, int32_t *value) {
  char *end = NULL;
  errno = 0;
  long long number = strtoll(text, &end, 10);
  if (errno != 0 || end == text || *end != '\0' || number < low || number > INT32_MAX) return false;
  *value = (int32_t)number;
  return true;
}

/* Splits `operation:index`: how long the operation's name is, and the index. */
static bool parse_tensor_name(const char *name, size_t *length, int32_t *index) {
  const char *colon = strrchr(name, ':');
  if (colon == NULL || colon == name) return false;
  *length = (size_t)(colon - name);
  return parse_int32(colon + 1, 0, index);
}

/* Fills `options`, whose list of libraries has room for argc entries. */
static int parse_options(int argc, char **argv, Options *options) {
  int at = 1;
  while (at < argc && strcmp(argv[at], "--") != 0) {
    const char *option = argv[at++];
    const char **value = NULL;
    if (strcmp(option, "--model") == 0) {
      value = &options->model;
    } else if (strcmp(option, "--library") == 0) {
      value = &options->libraries[options->library_count];
    } else if (strcmp(option, "--input") == 0) {
      value = &options->inputs[PROMPTS];
    } else if (strcmp(option, "--max-length") == 0) {
      value = &options->inputs[MAX_LENGTH];
    } else if (strcmp(option, "--text") == 0) {
      value = &options->outputs[TEXT];
    } else if (strcmp(option, "--error") == 0) {
      value = &options->outputs[ERROR];
    } else {
      return usage("unknown option", option);
    }
    if (at == argc) return usage("no value for", option);
    *value = argv[at++];
    if (value == &options->inputs[MAX_LENGTH]) {
      if (at == argc) return usage("no value for", option);
      if (!parse_int32(argv[at], INT32_MIN, &options->max_length)) {
        return usage("not an int32", argv[at]);
      }
      at++;
    } else if (strcmp(option, "--library") == 0) {
      options->library_count++;
    }
  }
  if (at < argc) at++; /* the "--" */
  options->prompts = argv + at;
  options->prompt_count = argc - at;

  if (options->model == NULL) return usage("missing", "--model");
  if (options->inputs[PROMPTS] == NULL) return usage("missing", "--input");
  if (options->outputs[TEXT] == NULL) return usage("missing", "--text");
  if (options->outputs[ERROR] == NULL) return usage("missing", "--error");
  if (options->prompt_count == 0) return usage("missing", "-- PROMPT...");

  const char *names[] = {options->inputs[PROMPTS], options->inputs[MAX_LENGTH],
                         options->outputs[TEXT], options->outputs[ERROR]};
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    size_t length;
    int32_t index;
    if (names[i] != NULL && !parse_tensor_name(names[i], &length, &index)) {
      return usage("not a tensor's name", names[i]);
    }
  }
  return SUCCEEDED;
}

/* ------------------------------------------------------------------ what can fail */

static bool complain(const char *problem, const char *what) {
  fprintf(stderr, "ask: %s: %s\n", problem, what);
  return false;
}

static bool is_ok(const TF_Status *status, const char *during) {
  return TF_GetCode(status) == TF_OK || complain(during, TF_Message(status));
}

/* ------------------------------------------------------------------ loading */

static bool load(const Options *options, Runtime *runtime) {
  /* Ops first: a graph with an op that is not registered does not load. */
  for (int i = 0; i < options->library_count; i++) {
    runtime->libraries[i] = TF_LoadLibrary(options->libraries[i], runtime->status);
    if (!is_ok(runtime->status, "loading an op library")) return false;
  }
  runtime->graph = TF_NewGraph();
  runtime->session_options = TF_NewSessionOptions();
  if (runtime->graph == NULL || runtime->session_options == NULL) {
    return complain("out of memory", "the session");
  }
  const char *tags[] = {"serve"};
  runtime->session =
      TF_LoadSessionFromSavedModel(runtime->session_options, /*run_options=*/NULL, options->model,
                                   tags, 1, runtime->graph, /*meta_graph_def=*/NULL,
                                   runtime->status);
  return is_ok(runtime->status, "loading the model");
}

/* ------------------------------------------------------------------ tensors */

static TF_Tensor *new_strings(char **values, int count) {
  const int64_t shape[] = {count};
  TF_Tensor *tensor = TF_AllocateTensor(TF_STRING, shape, 1, (size_t)count * sizeof(TF_TString));
  if (tensor == NULL) return NULL;
  TF_TString *strings = TF_TensorData(tensor);
  for (int i = 0; i < count; i++) {
    TF_TString_Init(&strings[i]);
    TF_TString_Copy(&strings[i], values[i], strlen(values[i]));
  }
  return tensor;
}

/* Of a tensor that this program filled; one that TensorFlow filled frees its strings itself. */
static void delete_strings(TF_Tensor *tensor) {
  if (tensor == NULL) return;
  TF_TString *strings = TF_TensorData(tensor);
  for (int64_t i = 0; i < TF_TensorElementCount(tensor); i++) TF_TString_Dealloc(&strings[i]);
  TF_DeleteTensor(tensor);
}

static TF_Tensor *new_int32(int32_t value) {
  TF_Tensor *tensor = TF_AllocateTensor(TF_INT32, /*dims=*/NULL, 0, sizeof value);
  if (tensor != NULL) memcpy(TF_TensorData(tensor), &value, sizeof value);
  return tensor;
}

static bool find(TF_Graph *graph, const char *name, TF_Output *found) {
  size_t length;
  int32_t index;
  if (!parse_tensor_name(name, &length, &index)) return complain("not a tensor's name", name);
  char *operation = malloc(length + 1);
  if (operation == NULL) return complain("out of memory", name);
  memcpy(operation, name, length);
  operation[length] = '\0';
  found->oper = TF_GraphOperationByName(graph, operation);
  found->index = index;
  free(operation);
  if (found->oper == NULL || index >= TF_OperationNumOutputs(found->oper)) {
    return complain("the model has no tensor of this name", name);
  }
  return true;
}

/* ------------------------------------------------------------------ asking */

static bool run(const Options *options, Runtime *runtime) {
  TF_Output feeds[MAX_INPUTS], fetches[OUTPUTS];
  int feed_count = options->inputs[MAX_LENGTH] == NULL ? 1 : 2;
  for (int i = 0; i < feed_count; i++) {
    if (!find(runtime->graph, options->inputs[i], &feeds[i])) return false;
  }
  for (int i = 0; i < OUTPUTS; i++) {
    if (!find(runtime->graph, options->outputs[i], &fetches[i])) return false;
  }

  runtime->inputs[PROMPTS] = new_strings(options->prompts, options->prompt_count);
  if (feed_count == 2) runtime->inputs[MAX_LENGTH] = new_int32(options->max_length);
  for (int i = 0; i < feed_count; i++) {
    if (runtime->inputs[i] == NULL) return complain("out of memory", options->inputs[i]);
  }

  TF_SessionRun(runtime->session, /*run_options=*/NULL, feeds, runtime->inputs, feed_count, fetches,
                runtime->outputs, OUTPUTS, /*targets=*/NULL, 0, /*run_metadata=*/NULL,
                runtime->status);
  return is_ok(runtime->status, "running the model");
}

static bool print_answers(const Options *options, const Runtime *runtime) {
  const TF_TString *columns[OUTPUTS];
  for (int i = 0; i < OUTPUTS; i++) {
    const TF_Tensor *tensor = runtime->outputs[i];
    if (TF_TensorType(tensor) != TF_STRING || TF_NumDims(tensor) != 1 ||
        TF_Dim(tensor, 0) != options->prompt_count) {
      return complain("not one string for each prompt", options->outputs[i]);
    }
    columns[i] = TF_TensorData(tensor);
  }
  for (int row = 0; row < options->prompt_count; row++) {
    for (int i = 0; i < OUTPUTS; i++) {
      const TF_TString *string = &columns[i][row];
      fwrite(TF_TString_GetDataPointer(string), 1, TF_TString_GetSize(string), stdout);
      putchar('\0');
    }
  }
  if (fflush(stdout) != 0 || ferror(stdout)) return complain("writing", "standard output");
  return true;
}

/* ------------------------------------------------------------------ all of it */

static void clean_up(const Options *options, Runtime *runtime) {
  /* Inputs last: an output may be an input's memory, passed through. */
  for (int i = 0; i < OUTPUTS; i++) TF_DeleteTensor(runtime->outputs[i]);
  if (runtime->session != NULL) {
    TF_CloseSession(runtime->session, runtime->status);
    TF_DeleteSession(runtime->session, runtime->status);
  }
  delete_strings(runtime->inputs[PROMPTS]);
  TF_DeleteTensor(runtime->inputs[MAX_LENGTH]);
  TF_DeleteSessionOptions(runtime->session_options);
  TF_DeleteGraph(runtime->graph);
  if (runtime->libraries != NULL) {
    for (int i = 0; i < options->library_count; i++) TF_DeleteLibraryHandle(runtime->libraries[i]);
  }
  free(runtime->libraries);
  TF_DeleteStatus(runtime->status);
}

int main(int argc, char **argv) {
  Options options = {0};
  Runtime runtime = {0};
  /* One more than there can be, so that none is no special case. */
  options.libraries = calloc((size_t)argc + 1, sizeof *options.libraries);
  if (options.libraries == NULL) {
    complain("out of memory", "the command line");
    return FAILED;
  }
  int result = parse_options(argc, argv, &options);
  if (result == SUCCEEDED) {
    runtime.status = TF_NewStatus();
    runtime.libraries = calloc((size_t)options.library_count + 1, sizeof *runtime.libraries);
    if (runtime.status == NULL || runtime.libraries == NULL) {
      complain("out of memory", "the runtime");
      result = FAILED;
    } else if (!load(&options, &runtime) || !run(&options, &runtime) ||
               !print_answers(&options, &runtime)) {
      result = FAILED;
    }
    clean_up(&options, &runtime);
  }
  free(options.libraries);
  return result;
}
