-- The scripts of the stream protocol. Each is atomic, and repeating a call changes nothing.
-- KEYS[1] = "{run}". ARGV = name, arguments (msgpack), then one body for each sealed record ("" when it lies in a blob).
-- A script asks the server for its run_id itself, so no client can act on a life of the broker that lost its tail.

local call, a = redis.call, cmsgpack.unpack(ARGV[2])
local STREAM, GROUP = {'prompts', 'rollouts', 'scored', 'batches'}, 'readers'
local ISSUED, SCORED, BATCHED = 1, 3, 4
local HEAD = 1024 -- bytes kept of what is quarantined

local function key(name) return KEYS[1] .. ':' .. name end
local function number(name) return tonumber(call('GET', key(name)) or 0) end
local function server() return string.match(call('INFO', 'server'), 'run_id:(%x+)') end

local function named() return call('HGET', key('boot'), 'nonce') end

local held -- the boot that this server process holds; '' when there is none, or after a lost tail
local function nonce()
  if not held then
    local boot = call('HMGET', key('boot'), 'nonce', 'run_id')
    held = boot[1] and boot[2] == server() and boot[1] or ''
  end
  return held
end

local function guard(boot) -- nil, or why this call may change nothing
  if nonce() == '' or (boot and boot ~= nonce()) then return 'amnesia' end
  if a.lineage then
    if number('lineage') ~= a.lineage then return 'fenced' end
  elseif call('GET', key('end')) == 'closed' then
    return 'closed'
  end
end

local function boot_of(attempt) return string.match(attempt, '^(.*)%.%d+$') or '' end
local function state(seq) return call('HGET', key('state'), seq) end
local function at(attempt, stage) return attempt .. '|' .. stage end
local function put(seq, attempt, stage) call('HSET', key('state'), seq, at(attempt, stage)) end

local function stage_of(value) return tonumber(string.sub(value, -1)) end

local function weigh(seq, size) -- bytes in flight: the newest record of each group
  local before = tonumber(call('HGET', key('sizes'), seq) or 0)
  if size == 0 then call('HDEL', key('sizes'), seq) else call('HSET', key('sizes'), seq, size) end
  if size ~= before then call('INCRBY', key('bytes'), size - before) end
end

local function add(stage, seq, attempt, min_version, i) -- the i-th sealed record of this call
  local digest, size, ref = unpack(a.seals[i])
  local where, what = 'body', ARGV[2 + i]
  if ref ~= '' then where, what = 'ref', ref end
  weigh(seq, size)
  return call('XADD', key(STREAM[stage]), '*', 'seq', seq, 'attempt', attempt, 'min_version', min_version,
    'digest', digest, 'size', size, where, what)
end

local function drop(stage, id)
  call('XACK', key(STREAM[stage]), GROUP, id)
  call('XDEL', key(STREAM[stage]), id)
end

local function put_back(stage, id, fields)
  if call('XACK', key(STREAM[stage]), GROUP, id) == 0 then return end
  call('XDEL', key(STREAM[stage]), id)
  call('XADD', key(STREAM[stage]), '*', unpack(fields))
end

local function fated(seq, why)
  call('HDEL', key('state'), seq)
  call('HDEL', key('kills'), seq)
  call('HSET', key('fates'), seq, why)
  call('INCR', key('fated'))
  weigh(seq, 0)
end

local function issue_again(seq, attempt)
  local boot, k = string.match(attempt, '^(.*)%.(%d+)$')
  put(seq, boot .. '.' .. (k + 1), ISSUED)
  call('RPUSH', key('again'), seq)
  weigh(seq, 0)
end

local function quarantine(source, reason, head, seq)
  call('XADD', key('quarantine'), 'MAXLEN', '~', 1000, '*', 'source', source, 'reason', reason, 'seq', seq,
    'head', string.sub(head, 1, HEAD))
end

-- ---------------------------------------------------------------------------------------------------- feeder
local scripts = {}

function scripts.issue()
  local refused = guard(a.boot)
  if refused then return refused end
  local issued, fated_, bytes, answers = number('issued'), number('fated'), number('bytes'), {}
  local ending, waiting = call('GET', key('end')), call('LLEN', key('again')) > 0
  local min_version = math.max(0, number('steps') - a.staleness)
  for i, seq in ipairs(a.seqs) do
    local flight = issued - fated_
    if waiting and call('LREM', key('again'), 1, seq) == 1 then
      add(ISSUED, seq, string.match(state(seq), '^(.*)|'), min_version, i)
      answers[i] = 'done'
    elseif ending or seq ~= issued then
      answers[i] = 'already'
    elseif flight >= a.window or (bytes >= a.cap and flight >= a.per_step) then
      answers[i] = 'full'
      break
    else
      put(seq, a.boot .. '.1', ISSUED)
      add(ISSUED, seq, a.boot .. '.1', min_version, i)
      issued, bytes, answers[i] = issued + 1, bytes + a.seals[i][2], 'done'
    end
  end
  call('SET', key('issued'), issued)
  return answers
end

function scripts.drain()
  local refused = guard(a.boot)
  if refused then return refused end
  if call('GET', key('end')) then return 'done' end
  if number('issued') ~= a.issued or call('LLEN', key('again')) > 0 then return 'wait' end
  call('SET', key('end'), 'drain')
  return 'done'
end

-- -------------------------------------------------------------------------------------------------- readers
local function parse(fields) -- the record's fields, or nil and why they cannot be one of ours
  local f = {}
  for i = 1, #fields, 2 do f[fields[i]] = fields[i + 1] end
  f.body = f.body or ''
  local shaped = #fields == 12 and string.match(f.seq or '', '^%d+$') and #f.seq < 16 and string.match(f.attempt or '', '^%w+%.%d+$')
    and string.match(f.min_version or '', '^%d+$') and string.match(f.digest or '', '^%x+$')
    and string.match(f.size or '', '^%d+$') and (f.ref or f.body ~= '')
  if not shaped then return nil, f end
  return f
end

local function heal(stage) -- a group whose only entry was deleted or damaged is issued again
  local there = {}
  for _, row in ipairs(call('XRANGE', key(STREAM[stage]), '-', '+')) do
    local f = parse(row[2])
    if f then there[f.seq .. ' ' .. at(f.attempt, stage)] = true end
  end
  if stage == ISSUED then
    for _, seq in ipairs(call('LRANGE', key('again'), 0, -1)) do there[seq .. ' ' .. (state(seq) or '')] = true end
  end
  local all = call('HGETALL', key('state'))
  for i = 1, #all, 2 do
    local attempt, where = string.match(all[i + 1], '^(.*)|(%d)$')
    if tonumber(where) == stage and not there[all[i] .. ' ' .. all[i + 1]] then
      quarantine(STREAM[stage], 'its entry was deleted or damaged; issued again', '', all[i])
      issue_again(all[i], attempt)
    end
  end
end

-- Of `rows` keep what this reader may work on; what nobody can use leaves the stream, with its head in quarantine.
-- An item that killed its consumer twice comes alone, to an empty reader: any other gets it put back.
local function admit(stage, rows, killed, together)
  local kept, garbage, alone = {}, false, false
  for _, row in ipairs(rows) do
    local id, fields = row[1], row[2] or {}
    local f, rest = parse(fields)
    local mine = f and state(f.seq) == at(f.attempt, stage)
    if not mine then
      drop(stage, id)
      garbage = garbage or not f
      local why = f and 'no such group waits here: a copy, an attempt that was given up, or a stranger' or 'fields are absent or malformed'
      quarantine(STREAM[stage], why, (f or rest).body, f and f.seq or -1)
    else
      local kills = killed and call('HINCRBY', key('kills'), f.seq, 1) or tonumber(call('HGET', key('kills'), f.seq) or 0)
      local single = kills >= a.convict - 1
      if killed and kills >= a.convict then
        quarantine(STREAM[stage], 'killed its consumer ' .. kills .. ' times, the last time alone', f.body, f.seq)
        fated(f.seq, 'dead:killed its consumer')
        drop(stage, id)
      elseif not together and (alone or (single and (#kept > 0 or not a.empty))) then
        put_back(stage, id, fields)
      else
        alone = alone or single
        local body = #f.body <= a.max_bytes and f.body or ''
        kept[#kept + 1] = {id, f.seq, f.attempt, f.min_version, single and 1 or 0, f.digest, f.size, f.ref or '', body, #f.body}
      end
    end
  end
  if garbage then heal(stage) end
  return kept
end

local function fresh(stage, from, count)
  local streams = call('XREADGROUP', 'GROUP', GROUP, a.consumer, 'COUNT', count, 'STREAMS', key(STREAM[stage]), from)
  return streams and streams[1][2] or {}
end

local function entries(stage, ids)
  local rows = {}
  for _, id in ipairs(ids) do rows[#rows + 1] = call('XRANGE', key(STREAM[stage]), id, id)[1] end
  return rows
end

local function readable() return nonce() ~= '' and call('GET', key('end')) ~= 'closed' end

function scripts.read() -- `woken`: delivered by the blocking read before this call
  if not readable() then return 'wait' end
  local rows = entries(a.stage, a.woken)
  if #rows < a.count then
    for _, row in ipairs(fresh(a.stage, '>', a.count - #rows)) do rows[#rows + 1] = row end
  end
  return admit(a.stage, rows)
end

function scripts.own_pending() -- also before the stamp and after the end: "nothing" must mean nothing
  if not named() then return {} end
  return admit(a.stage, fresh(a.stage, '0', 10000), false, true)
end

local function claim(stage, id) call('XCLAIM', key(STREAM[stage]), GROUP, a.consumer, 0, id, 'JUSTID') end

function scripts.reap() -- XPENDING IDLE looks at the whole list: XAUTOCLAIM would stop early, and take from its caller too
  if not readable() then return {} end
  local ids, from, page = {}, '-', nil
  repeat
    page = call('XPENDING', key(STREAM[a.stage]), GROUP, 'IDLE', a.idle_ms, from, '+', 100)
    for _, row in ipairs(page) do
      from = '(' .. row[1]
      if row[2] ~= a.consumer and #ids < a.count then
        ids[#ids + 1] = row[1]
        claim(a.stage, row[1])
      end
    end
  until #page < 100 or #ids == a.count
  local rows = entries(a.stage, ids)
  if #rows < #ids then heal(a.stage) end
  return admit(a.stage, rows, true)
end

function scripts.sweep() -- everything that `known` lacks, under whatever name it pends, then what is new
  if not readable() then return 'wait' end
  local known, ids = {}, {}
  for _, id in ipairs(a.known) do known[id] = true end
  for _, row in ipairs(call('XPENDING', key(STREAM[a.stage]), GROUP, '-', '+', #a.known + a.count)) do
    local id, owner = row[1], row[2]
    if not known[id] and #ids < a.count then
      ids[#ids + 1] = id
      if owner ~= a.consumer then claim(a.stage, id) end
    end
  end
  local rows = entries(a.stage, ids)
  if #rows < #ids then heal(a.stage) end
  if #ids < a.count then
    for _, row in ipairs(fresh(a.stage, '>', a.count - #ids)) do rows[#rows + 1] = row end
  end
  return admit(a.stage, rows, false, true)
end

function scripts.renew()
  if not readable() then return end
  local lost = false
  for _, id in ipairs(a.ids) do
    local row = call('XPENDING', key(STREAM[a.stage]), GROUP, id, id, 1)[1]
    if row and row[2] == a.consumer then
      lost = #call('XCLAIM', key(STREAM[a.stage]), GROUP, a.consumer, 0, id, 'JUSTID') == 0 or lost
    end
  end
  if lost then heal(a.stage) end
end

function scripts.release()
  for i, id in ipairs(a.ids) do
    local row = entries(a.stages[i], {id})[1]
    if row then put_back(a.stages[i], id, row[2]) end
  end
end

-- ---------------------------------------------------------------------------------- whoever holds an entry
function scripts.hand()
  local refused = guard()
  if refused then return refused end
  local answers = {}
  for i, seq in ipairs(a.seqs) do
    local attempt, stage, now = a.attempts[i], a.stages[i], state(seq)
    if boot_of(attempt) ~= nonce() then
      answers[i] = 'amnesia'
    else
      answers[i] = 'already'
      if now and now == at(attempt, stage_of(now)) and stage_of(now) <= stage then
        add(stage + 1, seq, attempt, a.min_versions[i], i)
        put(seq, attempt, stage + 1)
        call('HDEL', key('kills'), seq)
        answers[i] = 'done'
      end
      drop(stage, a.ids[i])
    end
  end
  return answers
end

function scripts.fate()
  local refused = guard(boot_of(a.attempt))
  if refused then return refused end
  local same = state(a.seq) == at(a.attempt, a.stage)
  if same then fated(a.seq, a.fate) end
  drop(a.stage, a.id)
  return same and 'done' or 'already'
end

function scripts.reissue()
  local refused = guard(boot_of(a.attempt))
  if refused then return refused end
  local same = state(a.seq) == at(a.attempt, a.stage)
  if same then
    quarantine(STREAM[a.stage], a.reason, '', a.seq)
    if tonumber(string.match(a.attempt, '(%d+)$')) >= a.convict then
      fated(a.seq, 'dead:' .. a.reason)
    else
      issue_again(a.seq, a.attempt)
    end
  end
  drop(a.stage, a.id)
  return same and 'done' or 'already'
end

function scripts.quarantine() quarantine(a.source, a.reason, ARGV[3], a.seq) end

-- ---------------------------------------------------------------------------------------------------- packer
function scripts.close()
  local refused = guard(a.boot)
  if refused then return {refused} end
  local stale, seen, batched, waiting = {}, {}, 0, 0
  for i, seq in ipairs(a.seqs) do
    local now = state(seq)
    if seen[seq] or now ~= at(a.attempts[i], SCORED) then stale[#stale + 1] = a.ids[i] else seen[seq] = true end
    if now == at(a.attempts[i], BATCHED) then batched = batched + 1 end
  end
  for _, id in ipairs(stale) do drop(SCORED, id) end
  if batched == #a.seqs then return {'already'} end
  if #stale > 0 then return {'stale', unpack(stale)} end
  for _, now in ipairs(call('HVALS', key('state'))) do
    if stage_of(now) < BATCHED then waiting = waiting + 1 end
  end
  local last = call('GET', key('end')) == 'drain' and waiting == #a.seqs
  if a.n ~= number('batchno') or (#a.seqs < a.per_step and not last) then return {'wait'} end
  local digest, size, ref = unpack(a.seals[1])
  local id = call('XADD', key('batches'), '*', 'n', a.n, 'members', a.members, 'digest', digest, 'size', size,
    ref == '' and 'body' or 'ref', ref == '' and ARGV[3] or ref)
  call('HSET', key('kept'), a.n, id .. ' ' .. size)
  call('INCR', key('batchno'))
  for i, seq in ipairs(a.seqs) do
    put(seq, a.attempts[i], BATCHED)
    drop(SCORED, a.ids[i])
  end
  return {'done'}
end

-- --------------------------------------------------------------------------------------------------- learner
function scripts.lead()
  if a.boot ~= named() or not (a.restamp or nonce() ~= '') then return 'amnesia' end
  if number('lineage') > a.lineage then return 'fenced' end
  call('SET', key('lineage'), a.lineage)
  call('HSET', key('boot'), 'run_id', server())
  return 'done'
end

function scripts.rebuild()
  if number('lineage') > a.lineage then return 'fenced' end
  if nonce() == a.boot then return 'done' end
  for _, name in ipairs({'boot', 'issued', 'fated', 'bytes', 'steps', 'batchno', 'state', 'sizes', 'fates', 'again', 'kills',
    'kept', 'end', 'weights', unpack(STREAM)}) do call('DEL', key(name)) end
  for _, name in ipairs(STREAM) do call('XGROUP', 'CREATE', key(name), GROUP, '0', 'MKSTREAM') end
  for name, value in pairs({lineage = a.lineage, steps = a.n, batchno = a.n, issued = a.issued, fated = a.fated}) do
    call('SET', key(name), value)
  end
  call('HSET', key('committed'), 'lineage', a.lineage, 'n', a.n)
  if a.manifest ~= '' then call('HSET', key('weights'), 'n', a.n, 'manifest', a.manifest) end
  for _, seq in ipairs(a.again) do
    put(seq, a.boot .. '.1', ISSUED)
    call('RPUSH', key('again'), seq)
  end
  call('HSET', key('boot'), 'nonce', a.boot, 'run_id', server())
  return 'done'
end

function scripts.batch() -- an index finds batch n, so that nothing a stranger writes can stand before it
  if nonce() == '' then return 'wait' end
  local kept = call('HGET', key('kept'), a.n)
  if not kept then return {} end
  local id = string.match(kept, '^(%S+)')
  local row = entries(BATCHED, {id})[1]
  return {id, row and row[2] or {}}
end

function scripts.start_batch()
  if guard(a.boot) then return 0 end
  local id = string.match(call('HGET', key('kept'), a.n) or '', '^(%S+)')
  if id then call('XCLAIM', key('batches'), GROUP, 'learner', 0, id, 'FORCE', 'JUSTID', 'LASTID', id) end
  return call('HINCRBY', key('kills'), 'b' .. a.n, 1)
end

function scripts.step()
  local refused = guard(a.boot)
  if refused then return refused end
  call('HDEL', key('kills'), 'b' .. (a.n - 1))
  if number('steps') >= a.n then return 'already' end
  if a.manifest ~= '' then call('HSET', key('weights'), 'n', a.n, 'manifest', a.manifest) end
  for i, seq in ipairs(a.seqs) do
    if state(seq) == at(a.attempts[i], BATCHED) then fated(seq, a.fates[i]) end
  end
  call('SET', key('steps'), a.n)
  return 'done'
end

function scripts.commit()
  local refused = guard(a.boot)
  if refused then return refused end
  local kept = call('HGETALL', key('kept'))
  for i = 1, #kept, 2 do
    if tonumber(kept[i]) < a.n then
      drop(BATCHED, string.match(kept[i + 1], '^(%S+)'))
      call('HDEL', key('kept'), kept[i])
    end
  end
  for _, seq in ipairs(a.seqs) do call('HDEL', key('fates'), seq) end
  local lineage, n = unpack(call('HMGET', key('committed'), 'lineage', 'n'))
  lineage, n = tonumber(lineage or 0), tonumber(n or 0)
  if a.of > lineage or (a.of == lineage and a.n > n) then call('HSET', key('committed'), 'lineage', a.of, 'n', a.n) end
  return 'done'
end

function scripts.finish()
  local refused = guard(a.boot)
  if refused then return refused end
  call('SET', key('end'), 'closed')
  return {call('HGETALL', key('fates')), call('HKEYS', key('state')), number('issued')}
end

-- ----------------------------------------------------------------------------------------------- the view
function scripts.boot() return nonce() end

function scripts.counters()
  if not named() then return {} end
  local depths, pending, inflight = {}, {}, {0, 0, 0, 0}
  for i, name in ipairs(STREAM) do
    depths[i], pending[i] = call('XLEN', key(name)), call('XPENDING', key(name), GROUP)[1]
  end
  for _, now in ipairs(call('HVALS', key('state'))) do inflight[stage_of(now)] = inflight[stage_of(now)] + 1 end
  return {named(), nonce() ~= '' and 1 or 0, number('issued'), number('fated'), number('steps'), number('batchno'),
    call('GET', key('end')) or '', call('LRANGE', key('again'), 0, -1), depths, pending, inflight, number('bytes'),
    tonumber(call('HGET', key('weights'), 'n') or -1)}
end

function scripts.retained() -- what a commit would free
  local bytes, steps, kept = 0, number('steps'), call('HGETALL', key('kept'))
  for i = 1, #kept, 2 do
    if tonumber(kept[i]) < steps then bytes = bytes + tonumber(string.match(kept[i + 1], '(%d+)$')) end
  end
  return bytes
end

function scripts.hold()
  local owner = call('GET', key('hold:' .. a.name))
  if owner and owner ~= a.owner then return 0 end
  call('SET', key('hold:' .. a.name), a.owner, 'PX', a.ttl_ms)
  return 1
end

function scripts.drop_hold()
  if call('GET', key('hold:' .. a.name)) == a.owner then call('DEL', key('hold:' .. a.name)) end
end

-- Readers of a stream are woken by the stream itself; this is for those who wait for room, weights, or the end.
local LOUD = {fate = 1, reissue = 1, drain = 1, lead = 1, rebuild = 1, step = 1, finish = 1}
local answer = scripts[ARGV[1]]()
if LOUD[ARGV[1]] then call('PUBLISH', key('news'), ARGV[1]) end
return answer
