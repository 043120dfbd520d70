! errors FLOW CONDITIONAL DISCRETE: misuse of fastmaf.f90, one line for each: the status and the text.
program errors
    use, intrinsic :: iso_fortran_env, only: int64, real64
    use fastmaf
    implicit none
    type(flow_model) :: model, conditional, discrete
    type(flow_evaluator) :: flow, given, values, nobody, copy
    character(1000) :: path
    character(200) :: errmsg
    real(real64), allocatable :: x(:, :), contexts(:, :), value(:), wrong(:, :), bits(:, :)
    integer :: stat

    errmsg = ''
    call model%open('/nowhere/to/be.found', stat, errmsg)
    call report()
    call nobody%create(model, stat=stat, errmsg=errmsg)
    call report()
    call model%from_memory('no flow', stat, errmsg)
    call report()
    call get_command_argument(1, path)
    call model%open(path, stat, errmsg)
    call report()
    call get_command_argument(2, path)
    call conditional%open(path)
    call get_command_argument(3, path)
    call discrete%open(path)
    call nobody%create(model, threads=0, stat=stat, errmsg=errmsg)
    call report()
    call flow%create(model)
    call given%create(conditional)
    call values%create(discrete)
    copy = flow
    allocate (x(model%features(), 4), contexts(conditional%context_features(), 4), value(4), wrong(model%features() + 1, 4))
    allocate (bits(discrete%features(), 4))
    x = 0
    contexts = 0
    wrong = 0
    bits = 0
    call copy%log_prob(x, value, stat=stat, errmsg=errmsg)
    call report()
    call flow%log_prob(x, value, stat=stat, errmsg=errmsg)
    call report()
    call flow%log_prob(wrong, value, stat=stat, errmsg=errmsg)
    call report()
    call flow%log_prob(x, value(:3), stat=stat, errmsg=errmsg)
    call report()
    call flow%log_prob(x, value, contexts, stat=stat, errmsg=errmsg)
    call report()
    call given%log_prob(x, value, stat=stat, errmsg=errmsg)
    call report()
    call given%log_prob(x, value, contexts(:, :3), stat=stat, errmsg=errmsg)
    call report()
    call given%log_prob(x, value, x(:, 1), stat=stat, errmsg=errmsg)
    call report()
    call flow%log_prob_and_grad(x, value, wrong, stat=stat, errmsg=errmsg)
    call report()
    call given%sample(x, contexts(:, :3), 1_int64, stat=stat, errmsg=errmsg)
    call report()
    call flow%sample(wrong, 1_int64, stat=stat, errmsg=errmsg)
    call report()
    call flow%sample(x, 1_int64, offset=-1_int64, stat=stat, errmsg=errmsg)
    call report()
    call flow%sample(x, 1_int64, context_offset=-1, stat=stat, errmsg=errmsg)
    call report()
    call flow%conditional_probs(x, x, stat=stat, errmsg=errmsg)
    call report()
    call values%to_noise(bits, bits, stat=stat, errmsg=errmsg)
    call report()
    call flow%log_prob(x(:, :0), value(:0), stat=stat, errmsg=errmsg)
    call report()
    call flow%log_prob(wrong, value)  ! stops

contains

    subroutine report()
        print '(i0, 1x, a)', stat, trim(errmsg)
        errmsg = ''
    end subroutine

end program
