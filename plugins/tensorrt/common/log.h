// Messages to the application's logger.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace razor::trt {

// Where messages go from now on: the finder's logger, or stderr if there is none. What TensorRT's setLoggerFinder does.
void set_logger_finder(nvinfer1::ILoggerFinder *finder) noexcept;

// One line, with "[trt_razor] " before it. Without a logger only warnings and errors are printed.
void log(nvinfer1::ILogger::Severity severity, const std::string &line) noexcept;

void log_error(const std::string &line) noexcept;

}  // namespace razor::trt
