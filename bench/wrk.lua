-- Posts the files of a list, in turn; prints one line of JSON at the end. Arguments: the list.
-- wrk itself adds to its latencies those that a stall kept it from measuring (`stats_correct`): any latency
-- over twice the mean counts several times, so the percentiles are rather too high than too low.

local requests, position = {}, 0

function init(arguments)
  wrk.headers["Content-Type"] = "image/jpeg"
  local key = os.getenv("FOVEA_KEY")
  if key and key ~= "" then
    wrk.headers["Authorization"] = "Bearer " .. key
  end
  for path in io.lines(arguments[1]) do
    local file = assert(io.open(path, "rb"))
    requests[#requests + 1] = wrk.format("POST", nil, nil, file:read("*a"))
    file:close()
  end
  collectgarbage()
end

function request()
  position = position % #requests + 1
  return requests[position]
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    'JSON {"requests":%d,"seconds":%.6f,"p50":%.6f,"p90":%.6f,"p99":%.6f,"max":%.6f,' ..
    '"refused":%d,"errors":%d}\n',
    summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e6, latency:percentile(90) / 1e6, latency:percentile(99) / 1e6,
    latency.max / 1e6, errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
