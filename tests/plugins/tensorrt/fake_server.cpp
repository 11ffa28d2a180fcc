// fake_server BACKEND runtime|registry: links no TensorRT, opens the backend for itself as Triton does.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    void *backend = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (backend == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 3;
    const auto run = reinterpret_cast<int (*)(bool)>(dlsym(backend, "run_backend"));
    return run(std::strcmp(argv[2], "registry") == 0);
}
