// Names of functions for messages. Kernels are hidden or static, so the dynamic linker does not know them; the symbol
// table of the library's file does, unless it was stripped.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>

#include <string>
#include <vector>

#include "machine.h"

namespace razor_shim {
namespace {

bool read_at(FILE *file, size_t offset, void *to, size_t bytes) {
    return fseek(file, static_cast<long>(offset), SEEK_SET) == 0 && fread(to, 1, bytes, file) == bytes;
}

// The name of the function that begins at `address` in the file, empty if there is none.
std::string find(FILE *file, ElfW(Addr) address) {
    ElfW(Ehdr) header;
    if (!read_at(file, 0, &header, sizeof(header))) return {};
    std::vector<ElfW(Shdr)> sections(header.e_shnum);
    if (!read_at(file, header.e_shoff, sections.data(), sections.size() * sizeof(sections[0]))) return {};
    for (const ElfW(Shdr) &table : sections) {
        if (table.sh_type != SHT_SYMTAB || table.sh_link >= sections.size()) continue;
        std::vector<ElfW(Sym)> symbols(table.sh_size / sizeof(ElfW(Sym)));
        std::vector<char> names(sections[table.sh_link].sh_size + 1);
        if (!read_at(file, table.sh_offset, symbols.data(), symbols.size() * sizeof(symbols[0])) ||
            !read_at(file, sections[table.sh_link].sh_offset, names.data(), names.size() - 1)) {
            return {};
        }
        for (const ElfW(Sym) &s : symbols) {
            if (s.st_value == address && (s.st_info & 0xf) == STT_FUNC && s.st_name < names.size()) {
                return names.data() + s.st_name;
            }
        }
    }
    return {};
}

}  // namespace

const char *function_name(const void *address) {
    static std::string name;
    name = "?";
    Dl_info info;
    void *extra = nullptr;
    if (!dladdr1(address, &info, &extra, RTLD_DL_LINKMAP) || extra == nullptr) return name.c_str();
    const ElfW(Addr) base = static_cast<const link_map *>(extra)->l_addr;
    const char *path = *static_cast<const link_map *>(extra)->l_name ? info.dli_fname : "/proc/self/exe";
    if (FILE *file = fopen(path, "rb")) {
        const std::string mangled = find(file, reinterpret_cast<ElfW(Addr)>(address) - base);
        fclose(file);
        if (!mangled.empty()) {
            char *plain = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, nullptr);
            name = plain ? plain : mangled;
            free(plain);
        }
    }
    return name.c_str();
}

}  // namespace razor_shim
