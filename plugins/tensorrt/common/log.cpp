#include "log.h"

#include <atomic>
#include <cstdio>

namespace razor::trt {

namespace {

std::atomic<nvinfer1::ILoggerFinder *> g_finder{nullptr};

nvinfer1::ILogger *find_logger() noexcept {
    nvinfer1::ILoggerFinder *finder = g_finder.load(std::memory_order_acquire);
    if (finder == nullptr) return nullptr;
    try {
        return finder->findLogger(); // the application's; may throw
    } catch (...) {
        return nullptr;
    }
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder *finder) noexcept {
    g_finder.store(finder, std::memory_order_release);
}

void log(nvinfer1::ILogger::Severity severity, const std::string &line) noexcept {
    try {
        const std::string text = "[trt_razor] " + line;
        if (nvinfer1::ILogger *logger = find_logger()) {
            logger->log(severity, text.c_str());
        } else if (severity <= nvinfer1::ILogger::Severity::kWARNING) {
            std::fprintf(stderr, "%s\n", text.c_str());
        }
    } catch (...) {
        std::fputs("[trt_razor] out of memory while writing a message\n", stderr);
    }
}

void log_error(const std::string &line) noexcept { log(nvinfer1::ILogger::Severity::kERROR, line); }

}  // namespace razor::trt
