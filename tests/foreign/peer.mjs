// A js-libp2p peer that does what it is told: commands come as JSON lines on stdin, answers and what
// happens meanwhile go as JSON lines to stdout. `node peer.mjs` and {"do":"start"} begin.

import { createInterface } from 'node:readline'

if (Promise.withResolvers === undefined) { // node 20 lacks what js-libp2p 3 uses
  Promise.withResolvers = function () {
    let resolve, reject
    const promise = new Promise((yes, no) => { resolve = yes; reject = no })
    return { promise, resolve, reject }
  }
}

const { createLibp2p } = await import('libp2p')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { gossipsub } = await import('@libp2p/gossipsub')
const { identify } = await import('@libp2p/identify')
const { kadDHT, passthroughMapper } = await import('@libp2p/kad-dht')
const { ping } = await import('@libp2p/ping')
const { tcp } = await import('@libp2p/tcp')
const { multiaddr } = await import('@multiformats/multiaddr')
const { CID } = await import('multiformats/cid')

const PATIENCE_MS = 30_000
const hex = bytes => Buffer.from(bytes).toString('hex')
const say = line => process.stdout.write(JSON.stringify(line) + '\n')
let peer

// Metrics are told of every stream of a protocol: that is the log of the exchanges.
const none = new Proxy({}, { get: (_, name) => name === 'then' ? undefined : () => () => {} })
const watching = () => new Proxy({
  trackMultiaddrConnection () {},
  trackProtocolStream (stream) {
    say({ event: 'stream', protocol: stream.protocol, direction: stream.direction })
  },
  traceFunction: (_, work) => work
}, { get: (own, name) => own[name] ?? (String(name).startsWith('register') ? () => none : undefined) })

const commands = {
  // `only`: the peers that it has connections with; others it would find through the DHT.
  async start ({ listen = ['/ip4/127.0.0.1/tcp/0'], only = null }) {
    await peer?.stop() // a second start makes another peer, with another key
    const stranger = id => only !== null && !only.includes(id.toString())
    peer = await createLibp2p({
      connectionGater: {
        denyDialMultiaddr: () => false, // js-libp2p's own denies addresses of this machine
        denyDialPeer: stranger,
        denyInboundEncryptedConnection: stranger
      },
      addresses: { listen },
      transports: [tcp()],
      connectionEncrypters: [noise()],
      streamMuxers: [yamux()],
      metrics: watching,
      connectionMonitor: { enabled: false }, // it pings when it likes
      services: {
        identify: identify(),
        ping: ping({ maxOutboundStreams: 4 }), // the DHT pings too, and one at a time is the default
        dht: kadDHT({ protocol: '/ipfs/kad/1.0.0', clientMode: false, peerInfoMapper: passthroughMapper }),
        pubsub: gossipsub({ allowPublishToZeroTopicPeers: true })
      }
    })
    peer.addEventListener('peer:identify', ({ detail }) => say({
      event: 'identified',
      peer: detail.peerId.toString(),
      agent: detail.agentVersion,
      protocol: detail.protocolVersion,
      protocols: detail.protocols,
      addrs: detail.listenAddrs.map(String),
      observed: detail.observedAddr?.toString() ?? null
    }))
    peer.addEventListener('connection:close', ({ detail }) => say({
      event: 'closed', peer: detail.remotePeer.toString()
    }))
    peer.services.pubsub.addEventListener('message', ({ detail }) => say({
      event: 'message',
      topic: detail.topic,
      from: detail.type === 'signed' ? detail.from.toString() : null,
      data: hex(detail.data)
    }))
    peer.services.pubsub.addEventListener('subscription-change', ({ detail }) => say({
      event: 'subscriptions',
      peer: detail.peerId.toString(),
      topics: detail.subscriptions.filter(one => one.subscribe).map(one => one.topic)
    }))
    peer.services.pubsub.addEventListener('gossipsub:graft', ({ detail }) => say({
      event: 'grafted', peer: detail.peerId, topic: detail.topic, direction: detail.direction
    }))
    return { peer: peer.peerId.toString(), addrs: peer.getMultiaddrs().map(String) }
  },
  async dial ({ addr }) {
    const connection = await peer.dial(multiaddr(addr))
    return { peer: connection.remotePeer.toString(), muxer: connection.multiplexer }
  },
  async ping ({ addr }) {
    return { ms: await peer.services.ping.ping(multiaddr(addr)) }
  },
  async subscribe ({ topic }) {
    peer.services.pubsub.subscribe(topic)
    return {}
  },
  async publish ({ topic, data }) {
    const sent = await peer.services.pubsub.publish(topic, Buffer.from(data, 'hex'))
    return { recipients: sent.recipients.map(String) }
  },
  async provide ({ cid }) {
    for await (const _ of peer.services.dht.provide(CID.parse(cid))) { /* each step of it */ }
    return {}
  },
  async providers ({ cid }) {
    const found = new Set()
    for await (const step of peer.services.dht.findProviders(CID.parse(cid))) {
      if (step.name === 'PROVIDER') step.providers.forEach(one => found.add(one.id.toString()))
    }
    return { providers: [...found] }
  },
  async closest ({ cid }) {
    const found = new Set()
    const errors = []
    for await (const step of peer.services.dht.getClosestPeers(CID.parse(cid).multihash.bytes)) {
      if (step.name === 'FINAL_PEER') found.add(step.peer.id.toString())
      if (step.name === 'PEER_RESPONSE') found.add(step.from.toString())
      if (step.name === 'QUERY_ERROR') errors.push(`${step.from}: ${step.error}`)
    }
    return { peers: [...found], errors }
  },
  // Bytes on a stream of a protocol, then its end; how it stands then.
  async raw ({ addr, protocol, data, end = 'close' }) {
    const stream = await peer.dialProtocol(multiaddr(addr), protocol)
    let received = 0
    let ended = 'open'
    stream.addEventListener('message', ({ data }) => { received += data.byteLength })
    stream.addEventListener('close', ({ error }) => { ended = error === undefined ? 'closed' : 'reset' })
    try {
      for (const piece of data) {
        if (!stream.send(Buffer.from(piece, 'hex'))) await stream.onDrain({ signal: patience() })
      }
      if (end === 'close') await stream.close({ signal: patience() })
      if (end === 'abort') stream.abort(new Error('half a message is all that there is'))
    } catch (error) {
      ended = error.name
    }
    return { received, ended }
  },
  async stop () {
    await peer.stop()
    setImmediate(() => process.exit(0))
    return {}
  }
}

const patience = () => AbortSignal.timeout(PATIENCE_MS)

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line)
  commands[command.do](command).then(
    reply => say({ reply: command.id, ...reply }),
    error => say({ reply: command.id, error: `${error.name}: ${error.message}` })
  )
}
process.exit(0)
