# Reads a Vagrantfile without Vagrant and writes what it asks for, as JSON: for the whole and for each machine a list
# of [setting, words, options].
require "json"

class Recorder
  def initialize(path, calls, machines)
    @path, @calls, @machines = path, calls, machines
  end

  def define(name, &block)
    block.call(Recorder.new("", @machines[name] = [], nil))
  end

  def method_missing(name, *words, **options, &block)
    path = "#{@path}#{name.to_s.delete_suffix("=")}"
    @calls << [path, words, options] unless words.empty? && options.empty?
    inner = Recorder.new("#{path}.", @calls, @machines)
    # vm.define and vm.provider "libvirt" do … end
    block&.call(words.empty? ? inner : Recorder.new("#{path}.#{words[0]}.", @calls, @machines))
    inner
  end

  def respond_to_missing?(*)
    true
  end
end

module Vagrant
  def self.require_version(*)
  end

  def self.configure(_version)
    calls, machines = [], {}
    yield Recorder.new("", calls, machines)
    puts JSON.generate(calls: calls, machines: machines)
  end
end

load ARGV.fetch(0)
